"""LayerNorm and residual sums by their formulas in plain PyTorch: the definition that faster forms are tested against.

Letters: b samples, c channels.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """Plain PyTorch runs everywhere."""
    return None if dtype.is_floating_point else f"it needs a floating-point type, got {dtype}"


def layer_norm(x: Float[Tensor, "b *tokens c"], weight: Tensor, bias: Tensor, *, eps: float) -> Float[Tensor, "b *tokens c"]:
    """See the contract in `kernels/norm/__init__.py`."""
    return _normalise(x, weight, bias, eps).to(x.dtype)


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
    return _add(residual, _normalise(branch, weight, bias, eps), scale).to(residual.dtype)


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
    total = _add(residual, branch.to(wide(branch)), scale).to(residual.dtype)
    return total, layer_norm(total, weight, bias, eps=eps)


def wide(x: Tensor) -> torch.dtype:
    """The type of statistics and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def per_sample(scale: Tensor, x: Tensor) -> Tensor:
    """(b,) as (b, 1, ..., 1) beside `x`."""
    return scale.reshape(-1, *(1,) * (x.dim() - 1))


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    x = x.to(wide(x))
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype) + bias.to(x.dtype)


def _add(residual: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    residual = residual.to(branch.dtype)
    return residual + branch if scale is None else residual + per_sample(scale.to(branch.dtype), branch) * branch
