"""Sums over hidden pixels and the loss that they make: sum of errors / (hidden pixels + 1e-5) / channels, as published.

Letters: b batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPSILON = 1e-5  # of the published denominator: keeps a batch without masked pixels at loss 0


@dataclass(frozen=True)
class MaskedSums:
    """Per sample: `error` (b,), summed over hidden pixels and channels; `count` (b,), hidden pixels of one channel. The channels
    are those that the error is a sum over: colours, or 1 for a target that has one error per pixel."""

    error: Float[Tensor, " b"]
    count: Float[Tensor, " b"]
    channels: int

    def mean(self, valid: Bool[Tensor, " b"] | None = None) -> Float[Tensor, ""]:
        """The published loss of the batch, over its valid samples (None: all)."""
        error, count = self._only(valid)
        return error.sum() / (count.sum() + EPSILON) / self.channels

    def per_sample(self, valid: Bool[Tensor, " b"] | None = None) -> Float[Tensor, " b"]:
        """The published loss of each sample as a batch of its own; 0 for a sample that is not valid."""
        error, count = self._only(valid)
        return error / (count + EPSILON) / self.channels

    def _only(self, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        if valid is None:
            return self.error, self.count
        # where, not a product: padding may hold anything, and NaN * 0 is NaN.
        zero = torch.zeros((), dtype=self.error.dtype, device=self.error.device)
        return torch.where(valid, self.error, zero), torch.where(valid, self.count, zero)
