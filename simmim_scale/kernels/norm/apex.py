"""NVIDIA Apex's FusedLayerNorm, with the residual sum beside it; needs Apex built with its CUDA extensions."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels import apex
from simmim_scale.kernels.norm.torch_native import add


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """NVIDIA GPUs, and NVIDIA's Apex: other packages of that name are told apart."""
    missing = apex.unavailable("normalization", "fused_layer_norm_cuda")
    if missing is not None:
        return missing
    if device.type != "cuda":
        return f"it runs on a GPU, got {device.type}"
    return None if dtype.is_floating_point else f"it needs a floating-point type, got {dtype}"


def layer_norm(x: Float[Tensor, "b *tokens c"], weight: Tensor, bias: Tensor, *, eps: float) -> Float[Tensor, "b *tokens c"]:
    """See the contract in `kernels/norm/__init__.py`."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, weight.to(x.dtype), bias.to(x.dtype), x.shape[-1:], eps=eps)


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
    return add(residual, layer_norm(branch, weight, bias, eps=eps), scale)


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
    total = add(residual, branch, scale)
    return total, layer_norm(total, weight, bias, eps=eps)
