"""What `simmim bench kernels` measures: implementations of dispatch, and beside them FlexAttention and compiled references."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from simmim_scale.bench.kernel_cases import AttentionCase, Case, LossCase, NormCase
from simmim_scale.kernels.dispatch import refusals
from simmim_scale.kernels.masked_loss import masked_loss
from simmim_scale.kernels.masked_loss import reference as masked_loss_reference
from simmim_scale.kernels.norm import post_norm, pre_norm
from simmim_scale.kernels.window_attention import reference, window_attention
from simmim_scale.kernels.window_attention.reference import merge, partition
from simmim_scale.kernels.window_attention.regions import MASKED_LOGIT, window_regions
from simmim_scale.kernels.window_attention.sdpa import scaled_query_key

COMPILED = "reference, compiled"
FLEX = "flex, compiled"


@dataclass(frozen=True)
class Contender:
    """A form of an op. `no_backward`: why only its forward pass is measured."""

    function: Callable[..., Any]
    no_backward: str | None = None


def find_contenders(
    case: Case, *, device: torch.device, dtype: torch.dtype, comparisons: bool
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Name -> form, for what can run here; and name -> reason, for what is not measured or only in part.

    Args:
        comparisons: also forms that dispatch does not know.
    """
    found, left_out = {}, {}
    for name, reason in refusals(case.op, device=device, dtype=dtype, **case.facts).items():
        if name == "compile" and not comparisons:
            left_out[name] = "--no-comparisons"
        elif reason is None:
            found[name] = Contender(functools.partial(_contract(case), implementation=name))
        else:
            left_out[name] = reason
    if comparisons and isinstance(case, AttentionCase | LossCase):  # the norms' is an implementation, "compile"
        plain = reference.window_attention if isinstance(case, AttentionCase) else masked_loss_reference.masked_loss
        found[COMPILED] = Contender(torch.compile(plain, dynamic=False))
    if comparisons and isinstance(case, AttentionCase):
        reason = None if device.type == "cuda" else "backward: PyTorch's FlexAttention has none on a CPU"
        found[FLEX] = Contender(flex(compiled=True), reason)
        if reason is not None:
            left_out[FLEX] = reason
    return found, left_out


def _contract(case: Case) -> Callable[..., Any]:
    if isinstance(case, NormCase):
        return post_norm if case.post else pre_norm
    return window_attention if isinstance(case, AttentionCase) else masked_loss


def flex(*, compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention with the bias and the regions in its score function; without compiling it is slow and runs anywhere."""
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def flex_window_attention(
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

    return flex_window_attention


def _score(bias: Tensor, regions: Tensor, *, shifted: bool) -> Callable[..., Tensor]:
    windows = regions.shape[0]

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[h, i, j]

    def masked(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = regions[b % windows, i] == regions[b % windows, j]
        return score + bias[h, i, j] + torch.where(same, 0.0, MASKED_LOGIT)

    return masked if shifted else biased
