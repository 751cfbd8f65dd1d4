"""Fresh random inputs for LayerNorm with its residual sums, and how results are held against float64."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from simmim_scale.kernels.norm import EPS, layer_norm, post_norm, pre_norm

ORDERS = ("plain", "post", "pre")
# Relative to the largest number of a tensor: a few roundings of the type. fp32's sums are long.
WITHIN = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """Inputs, and the gradients that arrive: of the result, and of pre-norm's sum."""

    branch: Tensor
    residual: Tensor
    scale: Tensor | None
    weight: Tensor
    bias: Tensor
    grad: Tensor
    grad_total: Tensor

    def to(self, what) -> "Case":
        return dataclasses.replace(self, **{name: value.to(what) for name, value in vars(self).items() if value is not None})

    def double(self) -> "Case":
        return self.to(torch.float64)

    def replace(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)


def make_case(shape: tuple[int, ...], dtype: torch.dtype, *, scaled: bool) -> Case:
    """Different at every run: a seed could hide what only some inputs show. Rows are not centred, one sample is dropped."""
    width = shape[-1]
    tokens = [(torch.randn(shape) * 2 + torch.randn(shape[:-1])[..., None]).to(dtype) for _ in range(4)]
    scale = torch.full((shape[0],), 1.25).index_fill(0, torch.tensor([shape[0] - 1]), 0.0) if scaled else None
    weight, bias = (1 + 0.5 * torch.randn(width)).to(dtype), torch.randn(width).to(dtype)
    return Case(tokens[0], tokens[1], scale, weight, bias, tokens[2], tokens[3])


def run(order: str, case: Case, form: str, *, backward: bool = True) -> dict[str, Tensor]:
    """Results and gradients by name, of the implementation `form`."""
    names = ("branch", "weight", "bias") if order == "plain" else ("branch", "residual", "weight", "bias")
    leaf = {name: getattr(case, name).detach().clone().requires_grad_() for name in names}
    options = {"eps": EPS, "implementation": form}
    if order == "plain":
        out, grads = (layer_norm(leaf["branch"], leaf["weight"], leaf["bias"], **options),), (case.grad,)
    else:
        function = post_norm if order == "post" else pre_norm
        found = function(leaf["branch"], leaf["residual"], case.scale, leaf["weight"], leaf["bias"], **options)
        out, grads = ((found,), (case.grad,)) if order == "post" else (found, (case.grad_total, case.grad))
    results = {f"out{number}": tensor for number, tensor in enumerate(out)}
    if backward:
        torch.autograd.backward(out, grads)
        results |= {f"grad of {name}": tensor.grad for name, tensor in leaf.items()}
    assert all(tensor.dtype == case.branch.dtype for tensor in results.values())
    return {name: tensor.detach() for name, tensor in results.items()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to the largest exact number."""
    assert found.keys() == exact.keys()
    return {
        name: float((found[name].double() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-30)) for name in exact
    }


def compare(found: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every tensor within the precision of `dtype`."""
    wrong = {name: error for name, error in errors(found, exact).items() if not error <= WITHIN[dtype]}
    assert not wrong, f"off by more than {WITHIN[dtype]}: {wrong}"
