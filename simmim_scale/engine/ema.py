"""An average of the weights over the steps (EMA), held as the optimizer holds the weights: each rank averages its own part.

Under ZeRO-1 to 3 a rank's fp32 master weights are flat pieces; the average has the same pieces, so it needs no communication and
as much memory as one of Adam's moments. Stage 0 averages whole parameters on every rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """The average over the applied steps.

    Args:
        masters: this rank's fp32 weights, see `master_weights`.
        decay: of the average a step; over the first n steps it is at most (1 + n) / (10 + n), so that the random start is
            forgotten (the choice of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.masters = masters
        self.decay = decay
        self.updates = 0
        self._average = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an applied step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._average, [master.detach() for master in self.masters], 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The masters hold the average while the block runs; what is made of them meanwhile is the average's."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @property
    def tensors(self) -> list[Tensor]:
        """The average itself, one tensor for each of the masters: what a save holds and a load overwrites (engine/state.py)."""
        return self._average

    @torch.no_grad()
    def _swap(self) -> None:
        for master, average in zip(self.masters, self._average, strict=True):
            held = master.detach().clone()
            master.copy_(average)
            average.copy_(held)


def master_weights(wrapped: Any) -> list[Tensor]:
    """This rank's fp32 weights as DeepSpeed's optimizer of each stage holds them (attributes of DeepSpeed 0.19.8)."""
    optimizer = wrapped.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # stage 3; stages 1 and 2
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in bf16 or fp16
        return [parameter for group in optimizer.fp32_groups for parameter in group]
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
