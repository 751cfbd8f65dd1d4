"""LayerNorm with its residual sum on a GPU by two Triton kernels: every tensor is read and written once.

The gradients of weight and bias are summed per program in a fixed order, and the programs' sums in another: no atomics, the same
digits every time. Kept for backward are what was normalised and two fp32 numbers a row. The kernels are PyTorch operators, so
that torch.compile does not break its graph at them. `TRITON_INTERPRET=1` runs them on a CPU, slowly, for tests.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from triton import knobs, next_power_of_2

from simmim_scale.kernels.norm.triton_kernels import PLAIN, POST, PRE, backward_kernel, forward_kernel

MAX_WIDTH = 4096  # a row lies in the registers of one program; backward's sums of 4,096 channels fit, twice that would spill
BLOCK_ELEMENTS = 2048  # narrow rows are taken together up to this many numbers
PROGRAMS_PER_PROCESSOR = 4  # of backward, each with its own sums of the gradients of weight and bias


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """NVIDIA GPUs from compute capability 8.0, fp32, bf16 and fp16, rows of up to 4,096 channels."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, got {dtype}"
    if facts.get("width", 1) > MAX_WIDTH:
        return f"a row of at most {MAX_WIDTH} channels fits, got {facts['width']}"
    if device.type == "cuda":
        if torch.version.hip:
            return "its kernels were compiled for NVIDIA GPUs only"
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"it needs compute capability 8.0, got {capability[0]}.{capability[1]}"
    if not (device.type == "cpu" and knobs.runtime.interpret):
        return f"it runs on an NVIDIA GPU, got {device.type}"
    return None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """See the contract in `kernels/norm/__init__.py`."""
    return torch.ops.simmim_scale.norm_forward(x, None, None, weight, bias, eps, PLAIN)[0]


def post_norm(branch: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """See the contract."""
    return torch.ops.simmim_scale.norm_forward(branch, residual, scale, weight, bias, eps, POST)[0]


def pre_norm(
    branch: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """See the contract."""
    normed, total, *_ = torch.ops.simmim_scale.norm_forward(branch, residual, scale, weight, bias, eps, PRE)
    return total, normed


def tiles(width: int) -> dict[str, int]:
    """Compile-time cut of both kernels for rows of `width` channels: BLOCK, ROWS and warps."""
    block = next_power_of_2(width)
    return {"BLOCK": block, "ROWS": max(1, BLOCK_ELEMENTS // block), "num_warps": 8 if block >= 4096 else 4}


@torch.library.custom_op("simmim_scale::norm_forward", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float, order: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(result, pre-norm's sum or empty, mean, 1 / standard deviation)."""
    x, rows = x.contiguous(), x.numel() // x.shape[-1]
    residual = x if residual is None else residual.contiguous()
    out, total, mean, rstd = _results(x, residual, scale, weight, bias, eps, order)
    if rows == 0:
        return out, total, mean, rstd
    cut = tiles(x.shape[-1])
    with _on(x.device):
        forward_kernel[(-(-rows // cut["ROWS"]),)](
            *(x, residual, _fp32(scale, mean), weight, bias, out, total if order == PRE else out, mean, rstd),
            *(rows, rows // x.shape[0], eps),
            ORDER=order,
            SCALED=scale is not None,
            C=x.shape[-1],
            **cut,
        )
    return out, total, mean, rstd


@_forward.register_fake
def _results(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float, order: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape if order == PRE else (0,)), mean, rstd


@torch.library.custom_op("simmim_scale::norm_backward", mutates_args=())
def _backward(
    kept: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_out: Tensor,
    grad_total: Tensor | None,
    order: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what was normalised, of pre-norm's scaled branch (else empty), of weight and of bias (fp32)."""
    kept, width, rows = kept.contiguous(), kept.shape[-1], mean.shape[0]
    grad_kept, grad_branch, *_ = _gradients(kept, scale, weight, mean, rstd, grad_out, grad_total, order)
    cut = tiles(width)
    groups = min(-(-rows // cut["ROWS"]), PROGRAMS_PER_PROCESSOR * _processors(kept.device))
    grad_weight, grad_bias = (mean.new_empty(groups, width) for _ in range(2))
    if rows:
        grad_out = grad_out.contiguous()
        with _on(kept.device):
            backward_kernel[(groups,)](
                *(kept, _fp32(scale, mean), weight, mean, rstd, grad_out),
                grad_out if grad_total is None else grad_total.contiguous(),
                *(grad_kept, grad_branch if grad_branch.numel() else grad_kept, grad_weight, grad_bias),
                *(rows, rows // kept.shape[0], groups),
                ORDER=order,
                SCALED=scale is not None,
                C=width,
                **cut,
            )
    return grad_kept, grad_branch, grad_weight.sum(0), grad_bias.sum(0)


@_backward.register_fake
def _gradients(
    kept: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_out: Tensor,
    grad_total: Tensor | None,
    order: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    split = order == PRE and scale is not None
    parameters = (mean.new_empty(kept.shape[-1]) for _ in range(2))
    return kept.new_empty(kept.shape), kept.new_empty(kept.shape if split else (0,)), *parameters


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _residual, scale, weight, bias, _eps, order = inputs
    _out, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.order, ctx.bias_type = order, bias.dtype
    ctx.save_for_backward(total if order == PRE else x, scale, weight, mean, rstd)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_total: Tensor | None, *_statistics: None) -> tuple[Any, ...]:
    kept, scale, weight, mean, rstd = ctx.saved_tensors
    if grad_out is None and grad_total is None:
        return (None,) * 7
    if ctx.order == PRE and (grad_out is None or grad_total is None):  # only one of the two results was used
        grad_out, grad_total = (torch.zeros_like(kept) if grad is None else grad for grad in (grad_out, grad_total))
    grad_kept, grad_branch, grad_weight, grad_bias = torch.ops.simmim_scale.norm_backward(
        kept, scale, weight, mean, rstd, grad_out, grad_total if ctx.order == PRE else None, ctx.order
    )
    parameters = (grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_type), None, None)
    if ctx.order == PLAIN:
        return grad_kept, None, None, *parameters
    if ctx.order == POST:
        return grad_kept, grad_out, None, *parameters
    return grad_kept if scale is None else grad_branch, grad_kept, None, *parameters


_forward.register_autograd(_differentiate, setup_context=_keep)


def _fp32(scale: Tensor | None, instead: Tensor) -> Tensor:
    """The scales, or any tensor of their type where there are none."""
    return instead if scale is None else scale.float().contiguous()


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton starts kernels on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
