"""LayerNorm, alone and together with the residual sum beside it: the contract; `reference.py` and the faster forms implement it.

Letters: b samples (the first axis), c channels (the last). Everything between is tokens.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels.dispatch import choose_name

EPS = 1e-5  # added to the variance; published Swin models keep PyTorch's default


def layer_norm(
    x: Float[Tensor, "b *tokens c"], weight: Float[Tensor, "c"], bias: Float[Tensor, "c"], *, eps: float, implementation: str
) -> Float[Tensor, "b *tokens c"]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in the dtype of `x`.

    Args:
        implementation: "auto" or a name of `kernels/dispatch.py`.

    Mean, variance and every sum are in fp32 (fp64 for fp64 input), as are those of backward. Gradients have their tensors' types.

    Raises:
        ValueError: the implementation cannot run here.
    """
    return _function("layer_norm", x, implementation)(x, weight, bias, eps=eps)


def post_norm(
    branch: Float[Tensor, "b *tokens c"],
    residual: Float[Tensor, "b *tokens c"],
    scale: Float[Tensor, "b"] | None,
    weight: Float[Tensor, "c"],
    bias: Float[Tensor, "c"],
    *,
    eps: float,
    implementation: str,
) -> Float[Tensor, "b *tokens c"]:
    """residual + scale * LN(branch): the end of a residual branch of Swin V2.

    Args:
        scale: drop path's factor of each sample, which gets no gradient; None: 1.
    """
    return _function("post_norm", branch, implementation)(branch, residual, _constant(scale), weight, bias, eps=eps)


def pre_norm(
    branch: Float[Tensor, "b *tokens c"],
    residual: Float[Tensor, "b *tokens c"],
    scale: Float[Tensor, "b"] | None,
    weight: Float[Tensor, "c"],
    bias: Float[Tensor, "c"],
    *,
    eps: float,
    implementation: str,
) -> tuple[Float[Tensor, "b *tokens c"], Float[Tensor, "b *tokens c"]]:
    """sum = residual + scale * branch, and LN(sum): the end of a branch of Swin V1 with the beginning of the next.

    The sum is rounded to the type of the tokens before it is normalised, so that both results belong together.

    Args:
        scale: drop path's factor of each sample, which gets no gradient; None: 1.
    """
    return _function("pre_norm", branch, implementation)(branch, residual, _constant(scale), weight, bias, eps=eps)


def _function(name: str, x: Tensor, implementation: str) -> Callable[..., Any]:
    chosen = choose_name("norm", implementation, device=x.device, dtype=x.dtype, width=x.shape[-1])
    return getattr(load(chosen), name)


def load(name: str) -> ModuleType:
    """The module of an implementation, imported by statements, which torch.compile can follow."""
    if name == "torch_native":
        from simmim_scale.kernels.norm import torch_native as found
    elif name == "triton":
        from simmim_scale.kernels.norm import triton as found
    elif name == "apex":
        from simmim_scale.kernels.norm import apex as found
    elif name == "compile":
        from simmim_scale.kernels.norm import compile as found
    else:
        assert name == "reference", f"no statement imports {name}"
        from simmim_scale.kernels.norm import reference as found
    return found


def _constant(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.detach()
