"""Views of an image: which part is cut out, and its resampling to the model's input size. uint8 in, uint8 out.

Letters: h, w = height and width in pixels, c = channels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from simmim_scale.data.random import DrawnAhead

CROP_ATTEMPTS = 10
CROP_DRAWS = 2 * CROP_ATTEMPTS + 2  # most numbers that a crop takes


@dataclass(frozen=True, slots=True)
class Crop:
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def sample_crop(
    rng: np.random.Generator | DrawnAhead, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
    """The rectangle of a RandomResizedCrop.

    Area uniform in `scale` (share of the image), aspect ratio (width over height) log-uniform in `ratio`, place uniform. After
    ten draws that do not fit in the image, the largest centred rectangle whose ratio is in range.

    Args:
        rng: Where the randomness comes from; at most `CROP_DRAWS` numbers are drawn.
        height, width: Of the image.
        scale: Range of the crop's share of the area; SimMIM's is (.67, 1).
        ratio: Range of width over height; SimMIM's is (3/4, 4/3).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * (scale[0] + rng.random() * (scale[1] - scale[0]))
        aspect = math.exp(low + rng.random() * (high - low))
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(rng.random() * (height - crop_height + 1))
            left = int(rng.random() * (width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width)
    return centre_crop(height, width, aspect=min(max(width / height, ratio[0]), ratio[1]))


def centre_crop(height: int, width: int, *, aspect: float) -> Crop:
    """The largest centred rectangle whose width over height is `aspect` (to the pixel).

    Resampled to a size of that aspect it is the usual "resize until it covers, then cut the centre", in one step.
    """
    crop_height = min(height, max(1, round(width / aspect)))
    crop_width = min(width, max(1, round(height * aspect)))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def resize_crop(
    image: UInt8[np.ndarray, "h w c"], crop: Crop, *, size: tuple[int, int], interpolation: str = "bilinear"
) -> UInt8[Tensor, "c h2 w2"]:
    """Cuts a rectangle out and resamples it, anti-aliased.

    Args:
        image: Pixels.
        crop: Rectangle inside the image.
        size: Height and width of the result.
        interpolation: "bilinear" or "bicubic".

    Returns:
        Pixels; channels lie last in memory where there are 3, which is what makes it fast.
    """
    cut = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    # Contiguous (h, w, c), then an axis added by torch (numpy's would have stride 0): this takes torch's channels-last kernel for
    # bytes, and leaves through it. Measured 0.16 ms for 330x440 -> 192x192, against 0.32 ms from a strided view.
    pixels = torch.from_numpy(cut.copy())[None].permute(0, 3, 1, 2)
    return interpolate(pixels, size, mode=interpolation, antialias=True)[0]
