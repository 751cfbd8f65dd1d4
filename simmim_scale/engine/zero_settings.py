"""ZeRO's numbers, computed from the model's own sizes: each with its reason. Pure.

DeepSpeed's defaults are constants made for language models of billions of parameters. SwinV2-H has 658M, in blocks of 1.5M to
95M. What the constants do was read in the source of DeepSpeed 0.19.8; no GPU has timed these settings yet.
"""

from dataclasses import dataclass
from typing import Any

# Share of the model that may stay whole on every rank. SwinV2-H: everything up to 1M elements, which is all norms, biases and
# position-bias MLPs, 343 of its 432 tensors, yet 12 MB in bf16.
PERSISTENT_SHARE = 0.01

# Elements of gradient below which a reduction is bound by latency and not by bandwidth: 32 MiB in bf16.
LEAST_BUCKET = 2**24

# Elements that may stay gathered from forward to backward: 2 GB in bf16, 2.5 % of an 80 GB device.
KEPT_ELEMENTS = 10**9


@dataclass(frozen=True)
class ModelSizes:
    """Elements of each parameter, and of the largest block (or parameter outside of blocks, where that is larger)."""

    parameters: tuple[int, ...]
    largest_block: int

    @property
    def total(self) -> int:
        return sum(self.parameters)


def zero_settings(stage: int, sizes: ModelSizes | None, *, world_size: int, may_keep: bool = True) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`.

    Args:
        sizes: None where the model does not exist yet: for `zero.Init`, which needs the stage alone.
        may_keep: whether a small model may stay gathered from forward to backward.
    """
    section: dict[str, Any] = {"stage": stage}
    if stage == 0 or sizes is None:
        return section
    section |= _reductions(stage, sizes, world_size)
    return section | (_gathers(sizes, may_keep) if stage == 3 else {})


def _reductions(stage: int, sizes: ModelSizes, world_size: int) -> dict[str, Any]:
    return {
        # A bucket is a buffer (two with overlap) that is reduced when full. One block: the reduction of a block's gradients runs
        # while the block before it computes. The default of 5e8 holds 3/4 of SwinV2-H, in 2 GB: nothing would overlap.
        "reduce_bucket_size": max(sizes.largest_block, LEAST_BUCKET),
        # Gradients are copied into that buffer as they come, so that each reduction is one call on contiguous memory.
        "contiguous_gradients": True,
        # With one rank there is nothing to hide, and in stages 1 and 2 overlapping ends backward with a wait for the device.
        "overlap_comm": world_size > 1 or stage == 3,
    }


def _gathers(sizes: ModelSizes, may_keep: bool) -> dict[str, Any]:
    keeps = may_keep and sizes.total <= KEPT_ELEMENTS
    return {
        # Small tensors cost a gather's latency for next to no memory: they stay whole, as many as PERSISTENT_SHARE allows.
        "stage3_param_persistence_threshold": persistence_threshold(sizes.parameters),
        # The next block is gathered while this one computes; the default of 5e7 holds half of SwinV2-H's largest.
        "stage3_prefetch_bucket_size": sizes.largest_block,
        # How far ahead, in elements, a use keeps a parameter gathered. Forward and backward together traverse the model twice:
        # then backward gathers nothing again, a third of the traffic. A larger model gives each block back after use; two blocks
        # cover the recomputation by activation checkpointing and the backward that follows it.
        "stage3_max_reuse_distance": 2 * sizes.total if keeps else 2 * sizes.largest_block,
        # Bounds the prefetch: this block, the next one, and one that is not yet released; or the whole model.
        "stage3_max_live_parameters": max(3 * sizes.largest_block, sizes.total if keeps else 0),
    }


def persistence_threshold(parameters: tuple[int, ...], share: float = PERSISTENT_SHARE) -> int:
    """The largest size such that all parameters up to it make at most `share` of the model; 0 when none do."""
    allowed, together, threshold = share * sum(parameters), 0, 0
    for size in sorted(set(parameters)):
        together += size * parameters.count(size)
        if together > allowed:
            break
        threshold = size
    return threshold
