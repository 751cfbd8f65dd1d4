"""Forms of window attention that are measured against and never chosen: FlexAttention, and torch.compile on the reference."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from simmim_scale.kernels.window_attention import reference
from simmim_scale.kernels.window_attention.reference import merge, partition
from simmim_scale.kernels.window_attention.regions import MASKED_LOGIT, window_regions
from simmim_scale.kernels.window_attention.sdpa import scaled_query_key


def compiled_reference() -> Callable[..., Tensor]:
    """The reference through torch.compile."""
    return torch.compile(reference.window_attention, dynamic=False)


def flex(*, compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention with the bias and the regions in its score function; without compiling it is slow and runs anywhere."""
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

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
        rolled = torch.roll(qkv, (-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else qkv
        q, k, v = partition(rolled, num_heads, window)
        q, k = scaled_query_key(q, k, logit_scale, torch.promote_types(qkv.dtype, torch.float32))
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        score = _score(bias, torch.from_numpy(window_regions(height, width, window, shift)).to(qkv.device), shifted=any(shift))
        attended = attend(q, k, v, score_mod=score, scale=1.0)
        merged = merge(attended.reshape(batch, -1, *attended.shape[1:]), batch, height, width, window)
        return torch.roll(merged, shift, dims=(1, 2)) if any(shift) else merged

    return window_attention


def _score(bias: Tensor, regions: Tensor, *, shifted: bool) -> Callable[..., Tensor]:
    windows = regions.shape[0]

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[h, i, j]

    def masked(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = regions[b % windows, i] == regions[b % windows, j]
        return score + bias[h, i, j] + torch.where(same, 0.0, MASKED_LOGIT)

    return masked if shifted else biased
