"""Window attention in plain PyTorch: roll, partition, attend, put back. The definition that faster forms are tested against.

Letters: b batch, h w tokens per axis, u v windows per axis, n tokens of one window, d head dim.
"""

import functools
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels.window_attention.regions import MASKED_LOGIT, window_regions

MAX_LOGIT_SCALE = math.log(100.0)  # SwinV2 paper, section 3.3: the learnable scale is not smaller than tau = 0.01
NORM_EPS = 1e-12  # below this a vector is not scaled to unit length; torch.nn.functional.normalize's default


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """Plain PyTorch runs everywhere."""
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
    """See the contract in `kernels/window_attention/__init__.py`."""
    batch, height, width, _ = qkv.shape
    # fp64 stays fp64, so that gradients can be checked numerically; half precisions get fp32 logits.
    wide = torch.promote_types(qkv.dtype, torch.float32)
    rolled = torch.roll(qkv, (-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else qkv
    q, k, v = partition(rolled, num_heads, window)
    logits = _logits(q, k, logit_scale, wide) + bias.to(wide)
    if any(shift):
        logits = logits + shift_mask(height, width, window, shift, logits)[:, None]
    attended = torch.softmax(logits, dim=-1).to(v.dtype) @ v
    merged = merge(attended, batch, height, width, window)
    return torch.roll(merged, shift, dims=(1, 2)) if any(shift) else merged


def partition(qkv: Tensor, num_heads: int, window: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(b, h, w, 3c) -> q, k, v, each (b, windows, heads, n, d)."""
    batch, height, width, channels = qkv.shape
    rows, columns = height // window[0], width // window[1]
    blocks = qkv.reshape(batch, rows, window[0], columns, window[1], 3, num_heads, channels // 3 // num_heads)
    parts = blocks.permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = parts.reshape(3, batch, rows * columns, num_heads, window[0] * window[1], -1).unbind(0)
    return q, k, v


def _logits(q: Tensor, k: Tensor, logit_scale: Tensor | None, wide: torch.dtype) -> Tensor:
    """Scaled cosine (V2) or scaled dot product (V1), (b, windows, heads, n, n) in `wide`."""
    if logit_scale is None:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).to(wide)
    # The norms are taken in `wide`: in fp16 a sum of squares overflows at |q| > 256 and underflows near zero.
    scale = logit_scale.to(wide).clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]
    unit_q, unit_k = unit(q.to(wide)).to(q.dtype), unit(k.to(wide)).to(k.dtype)
    return (unit_q @ unit_k.transpose(-2, -1)).to(wide) * scale


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1, as `torch.nn.functional.normalize`, but zero vectors get a gradient of 0 instead of 1e12 times theirs.

    Padded tokens have k = 0 exactly. The huge gradient would meet their zero input in the weight's gradient and vanish in fp32,
    but overflow to infinity and then NaN in fp16.
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * torch.where(norm > 0, norm.clamp(min=NORM_EPS).reciprocal(), 0.0)


def shift_mask(height: int, width: int, window: tuple[int, int], shift: tuple[int, int], like: Tensor) -> Tensor:
    """0 within a region, -100 between two, (windows, n, n); made on the device, where a copy of an n x n table would be slow."""
    region = _regions(like.device, height, width, window, shift)
    return (region[:, :, None] != region[:, None, :]).to(like.dtype) * MASKED_LOGIT


@torch.compiler.assume_constant_result
def _regions(device: torch.device, height: int, width: int, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """A constant of a compiled graph."""
    return _regions_on(device, height, width, window, shift)


@functools.lru_cache(maxsize=256)  # a copy from the host makes it wait for the device: once, not in every layer and step
def _regions_on(device: torch.device, height: int, width: int, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    with torch.inference_mode(False):  # it outlives an inference mode in which it may be made
        return torch.from_numpy(window_regions(height, width, window, shift)).to(device)


def merge(attended: Tensor, batch: int, height: int, width: int, window: tuple[int, int]) -> Tensor:
    """(b, windows, heads, n, d) -> (b, h, w, heads * d)."""
    rows, columns = height // window[0], width // window[1]
    blocks = attended.reshape(batch, rows, columns, attended.shape[2], window[0], window[1], -1)
    return blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, -1)
