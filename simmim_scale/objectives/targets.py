"""Prediction targets: what the head is compared with, and by which error. `TARGETS` names them, `Target` says what one must do.

Letters: b batch, c channels, h w picture height and width, rh rw predicted rows and columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.config.schema import ObjectiveConfig
from simmim_scale.objectives.masked_loss import MaskedSums
from simmim_scale.objectives.pixels import PixelNorm
from simmim_scale.objectives.prediction import Hidden, Pictures, Prediction

# name -> "module:function"; the function takes a TargetContext and returns the target. S table 4.
TARGETS = {
    "pixels": "simmim_scale.objectives.pixel_target:build",
    "bins": "simmim_scale.objectives.colour_targets:build_bins",
    "clusters": "simmim_scale.objectives.colour_targets:build_clusters",
    "tokens": "simmim_scale.objectives.token_target:build",
}


@dataclass(frozen=True)
class TargetContext:
    """What a target may depend on.

    Attributes:
        in_chans: channels of the image.
        image_size: height and width in pixels.
        stride: image pixels per token of the last stage.
        norm: normalisation of the image.
        settings: the configuration's section.
        masked_loss: implementation of the masked loss (kernels/dispatch.py).
    """

    in_chans: int
    image_size: tuple[int, int]
    stride: int
    norm: PixelNorm
    settings: ObjectiveConfig
    masked_loss: str = "auto"


class Target(nn.Module):
    """Base of all targets.

    Attributes:
        channels: numbers that the head must give for a predicted pixel.
        scale: image pixels per predicted pixel and side.
        grid: predicted rows and columns where `scale` does not give them (features are resampled to it); None: it does.
    """

    channels: int
    scale: int = 1
    grid: tuple[int, int] | None = None

    def sums(self, prediction: Prediction, pictures: Pictures, hidden: Hidden) -> MaskedSums:
        """The error over hidden predicted pixels. The prediction may be of some tokens only: all that hold hidden pixels."""
        raise NotImplementedError

    def multiply_adds(self) -> int:
        """Of the networks that a target runs on one image; 0: there are none."""
        return 0

    def summary(self, prediction: Prediction, size: tuple[int, int]) -> Float[Tensor, "b o rh rw"]:
        """What is told of a prediction in eval mode, cut to `size`: small, and all that `to_pixels` needs."""
        return prediction.picture(size)

    def to_pixels(self, summary: Float[Tensor, "b o rh rw"], pictures: Pictures) -> Float[Tensor, "b c h w"]:
        """A summary as normalised pixels of the image's size, to look at."""
        raise NotImplementedError

    def baseline(self, pictures: Pictures, hidden: Hidden) -> MaskedSums | None:
        """The same error for the best guess that knows the visible pixels' frequencies only; None: there is none."""
        return None


def enlarge(picture: Float[Tensor, "b c rh rw"], size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """Predicted pixels repeated over the image pixels that they stand for."""
    if picture.shape[2:] == size:
        return picture
    return torch.nn.functional.interpolate(picture, size, mode="nearest-exact")
