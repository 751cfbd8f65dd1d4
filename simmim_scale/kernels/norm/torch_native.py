"""PyTorch's own LayerNorm kernels with the residual sum done in their output: nothing of the sum is kept for backward.

Plain autograd would keep the normalised branch as well, only for the gradient of drop path's scales, which nobody wants.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels.norm.reference import per_sample, wide


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """PyTorch runs it everywhere."""
    return None if dtype.is_floating_point else f"it needs a floating-point type, got {dtype}"


def layer_norm(x: Float[Tensor, "b *tokens c"], weight: Tensor, bias: Tensor, *, eps: float) -> Float[Tensor, "b *tokens c"]:
    """See the contract in `kernels/norm/__init__.py`."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], *_parameters(x, weight, bias), eps)


def post_norm(
    branch: Float[Tensor, "b *tokens c"],
    residual: Float[Tensor, "b *tokens c"],
    scale: Float[Tensor, "b"] | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
) -> Float[Tensor, "b *tokens c"]:
    """See the contract."""
    if scale is None:  # then plain autograd keeps nothing of the sum either, and runs no Python
        return add(residual, layer_norm(branch, weight, bias, eps=eps), None)
    return _PostNorm.apply(branch, residual, scale, *_parameters(branch, weight, bias), eps)


def pre_norm(
    branch: Float[Tensor, "b *tokens c"],
    residual: Float[Tensor, "b *tokens c"],
    scale: Float[Tensor, "b"] | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
) -> tuple[Float[Tensor, "b *tokens c"], Float[Tensor, "b *tokens c"]]:
    """See the contract."""
    total = _Sum.apply(branch, residual, scale)
    return total, layer_norm(total, weight, bias, eps=eps)


def add(residual: Tensor, branch: Tensor, scale: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """residual + scale * branch, into `out` if given, rounded once."""
    if scale is None:
        return torch.add(residual, branch, out=out)
    return torch.addcmul(residual, branch, per_sample(scale.to(branch.dtype), branch), out=out)


def _parameters(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    # On a CPU the type of the weights decides that of the statistics: in half precision the factor of a whole row's gradient
    # would be off by up to 0.4 %. On a GPU they are fp32 anyhow, and mixed types are refused.
    return (weight.to(wide(x)), bias.to(wide(x))) if x.device.type == "cpu" else (weight, bias)


class _Sum(torch.autograd.Function):
    """residual + scale * branch; keeps the scale alone."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, residual: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale)
        return add(residual, branch, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return _scaled(grad, scale), grad, None


class _PostNorm(torch.autograd.Function):
    """residual + scale * LN(branch); keeps the branch and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(branch, branch.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(branch, scale, weight, bias, mean, rstd)
        return add(residual, normed, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, scale, weight, bias, mean, rstd = ctx.saved_tensors
        grads = torch.ops.aten.native_layer_norm_backward(
            _scaled(grad, scale), branch, branch.shape[-1:], mean, rstd, weight, bias, [True, True, True]
        )
        return grads[0], grad, None, grads[1], grads[2], None


def _scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    return grad if scale is None else grad * per_sample(scale.to(grad.dtype), grad)
