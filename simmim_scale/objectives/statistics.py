"""Mean and deviation of the window around every pixel, for targets that are normalised by their surroundings.

Letters: b batch, c channels, h w picture height and width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

VARIANCE_EPSILON = 1e-6  # R: added to the local variance


@dataclass(frozen=True)
class LocalStatistics:
    """Mean and standard deviation, each (b, c, h, w), of the window around every pixel."""

    mean: Tensor
    std: Tensor


def _band(side: int, window: int, device: torch.device) -> Tensor:
    """(side, side) fp64 matrix with 1 where two positions are at most window // 2 apart: a product with it is a sliding sum."""
    position = torch.arange(side, device=device)
    return ((position[:, None] - position[None, :]).abs() <= window // 2).double()


class SlidingStatistics:
    """Local mean and unbiased variance over a square window, of which only the part inside the picture counts (R: SwinV2).

    The sums are two products with band matrices per moment (rows, then columns) instead of a 47x47 pooling: about a hundredth
    of the time on a CPU. They are taken in fp64: E[x^2] - E[x]^2 cancels in fp32, and where a picture is flat that error is as
    large as the 1e-6 under the root (a tenth of the target's norm, measured on flat pictures with single specks, against 1e-7
    here). The cost is 7 ms instead of 3 per 192 px image on one core. Matrices and counts are kept per size and device.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._bands: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def bands(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Row band (h, h), column band (w, w) and the number of pixels in each window (h, w), fp64."""
        key = (height, width, device)
        if key not in self._bands:
            rows, columns = _band(height, self.window, device), _band(width, self.window, device)
            self._bands[key] = (rows, columns, rows.sum(1)[:, None] * columns.sum(1)[None, :])
        return self._bands[key]

    def __call__(self, image: Float[Tensor, "b c h w"]) -> LocalStatistics:
        """fp64 statistics of `image`. A window that holds a single pixel has variance 0."""
        rows, columns, count = self.bands(image.shape[2], image.shape[3], image.device)
        image = image.double()
        mean = rows @ image @ columns / count
        square = rows @ image.square() @ columns / count
        variance = ((square - mean.square()) * (count / (count - 1).clamp(min=1))).clamp(min=0)
        return LocalStatistics(mean=mean, std=(variance + VARIANCE_EPSILON).sqrt())


def norm_target(image: Float[Tensor, "b c h w"], window: int) -> Float[Tensor, "b c h w"]:
    """The image normalised by the mean and unbiased variance of a sliding window: (x - mean) / sqrt(max(var, 0) + 1e-6)."""
    local = SlidingStatistics(window)(image)
    return ((image - local.mean) / local.std).to(image.dtype)
