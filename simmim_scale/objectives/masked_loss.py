"""The masked l1 loss as published: sum(|x - x_hat| * m) / (sum(m) + 1e-5) / channels, all sums in fp32.

Letters: b batch, c channels, h w image height and width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPSILON = 1e-5  # of the published denominator: keeps a batch without masked pixels at loss 0


@dataclass(frozen=True)
class MaskedSums:
    """Per sample: `error` (b,), the absolute error over masked pixels of all channels; `count` (b,), masked pixels of one
    channel."""

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


def masked_l1_sums(
    prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b 1 h w"]
) -> MaskedSums:
    """Absolute error over the masked pixels. Sums are at least fp32, whatever the prediction's dtype."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(exact) - target.to(exact)).abs().masked_fill(~mask, 0.0)
    return MaskedSums(error=error.sum((1, 2, 3)), count=mask.sum((1, 2, 3)).to(exact), channels=target.shape[1])


def masked_l1(
    prediction: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b 1 h w"]
) -> Float[Tensor, ""]:
    """The published loss of a batch."""
    return masked_l1_sums(prediction, target, mask).mean()
