"""Window attention by PyTorch's scaled_dot_product_attention: a fall-back for GPUs that the Triton kernels do not know.

Only the memory-efficient and the plain back end are let in. cuDNN's was reported silently wrong with an fp32 mask and bf16
queries, and to return NaN gradients with any mask; FlashAttention takes no mask.
Letters: b batch, n tokens of one window, d head dim.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from simmim_scale.kernels.window_attention.reference import MAX_LOGIT_SCALE, merge, partition, shift_mask, unit

BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """PyTorch runs it everywhere; on a CPU the form made for CPUs is faster."""
    return None if dtype.is_floating_point else f"it needs a floating-point type, got {dtype}"


def window_attention(
    qkv: Float[Tensor, "b h w c3"],
    bias: Float[Tensor, "heads n n"],
    *,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    logit_scale: Float[Tensor, "heads"] | None,
) -> Float[Tensor, "b h w c"]:
    """See the contract in `kernels/window_attention/__init__.py`; half precisions round the bias to their own type."""
    batch, height, width, _ = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    rolled = torch.roll(qkv, (-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else qkv
    q, k, v = partition(rolled, num_heads, window)
    q, k = scaled_query_key(q, k, logit_scale, wide)
    added = bias.to(wide)
    if any(shift):
        # Windows differ in their mask: they go beside the heads, so that the mask is broadcast over images only.
        added = (shift_mask(height, width, window, shift, added)[:, None] + added).flatten(0, 1)
        q, k, v = (part.flatten(1, 2) for part in (q, k, v))
    else:
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    with sdpa_kernel(BACKENDS):
        attended = scaled_dot_product_attention(q, k, v, attn_mask=added.to(q.dtype)[None], scale=1.0)
    merged = merge(attended.reshape(batch, -1, num_heads, *attended.shape[-2:]), batch, height, width, window)
    return torch.roll(merged, shift, dims=(1, 2)) if any(shift) else merged


def scaled_query_key(q: Tensor, k: Tensor, logit_scale: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys whose plain product is the logit without bias."""
    if logit_scale is None:
        return q * q.shape[-1] ** -0.5, k
    scale = logit_scale.to(wide).clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]
    return (unit(q.to(wide)) * scale).to(q.dtype), unit(k.to(wide)).to(k.dtype)
