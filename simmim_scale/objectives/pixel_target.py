"""The pixels themselves as target: at full resolution or averaged to a lower one, plain or normalised by their surroundings.

Letters: b batch, c channels, h w picture height and width, rh rw predicted rows and columns.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels.masked_loss import Layout, Normalization, masked_loss
from simmim_scale.kernels.masked_loss.reference import pointwise
from simmim_scale.objectives.masked_loss import MaskedSums
from simmim_scale.objectives.prediction import Hidden, Pictures, Prediction
from simmim_scale.objectives.statistics import SlidingStatistics
from simmim_scale.objectives.targets import Target, TargetContext, enlarge


def build(context: TargetContext) -> "Pixels":
    """As the configuration says."""
    settings = context.settings
    return Pixels(
        in_chans=context.in_chans,
        norm_window=settings.norm_target_window,
        scale=settings.downsample,
        loss=settings.loss,
        beta=settings.smooth_l1_beta,
        implementation=context.masked_loss,
    )


class Pixels(Target):
    """Normalised pixels.

    Args:
        in_chans: channels of the image.
        norm_window: odd side of the normalising window in pixels (47 in SwinV2); None: plain pixels.
        scale: image pixels per predicted pixel and side; the target is their mean (after the normalisation).
        loss, beta: error of a pixel, see `kernels/masked_loss`.
        implementation: of the masked loss.
    """

    def __init__(
        self,
        *,
        in_chans: int,
        norm_window: int | None,
        scale: int = 1,
        loss: str = "l1",
        beta: float = 1.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.channels, self.scale = in_chans, scale
        self.loss, self.beta, self.implementation = loss, beta, implementation
        self.statistics = None if norm_window is None else SlidingStatistics(norm_window)

    @torch.no_grad()
    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c rh rw"]:
        """The target of a normalised image."""
        if self.statistics is not None:
            local = self.statistics(image)
            image = ((image - local.mean) / local.std).to(image.dtype)
        return image if self.scale == 1 else F.avg_pool2d(image, self.scale)

    def sums(self, prediction: Prediction, pictures: Pictures, hidden: Hidden) -> MaskedSums:
        """At full resolution the picture is read where it lies, and normalised in passing."""
        if self.scale == 1:
            picture, flip, normalization = pictures.stored, pictures.flip, self._normalization(pictures)
        else:
            picture, flip, normalization = self(pictures.image), None, Normalization()
        error = masked_loss(
            prediction.values,
            picture,
            hidden.mask,
            layout=Layout(prediction.grid, prediction.patch, hidden.cell),
            tokens=prediction.tokens,
            flip=flip,
            normalization=normalization,
            loss=self.loss,
            beta=self.beta,
            implementation=self.implementation,
        )
        return MaskedSums(error=error, count=hidden.count(error.dtype), channels=self.channels)

    @torch.no_grad()
    def to_pixels(self, summary: Float[Tensor, "b c rh rw"], pictures: Pictures) -> Float[Tensor, "b c h w"]:
        """Normalised pixels of a prediction.

        With a norm window the local mean and deviation of the true image are put back, also where it is hidden: the picture
        shows how well the normalised detail is predicted, not a reconstruction from visible pixels alone.
        """
        summary = enlarge(summary.float(), pictures.size)
        if self.statistics is None:
            return summary
        local = self.statistics(pictures.image)
        return (summary.double() * local.std + local.mean).to(pictures.image.dtype)

    @torch.no_grad()
    def baseline(self, pictures: Pictures, hidden: Hidden) -> MaskedSums:
        """The error of the mean of the visible target, everywhere."""
        target, mask = self(pictures.image), hidden.pixels()
        visible = (~mask).to(target.dtype)
        mean = (target * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True).clamp(min=1)
        error = pointwise(mean.expand_as(target), target, loss=self.loss, beta=self.beta)
        error = error.masked_fill(~mask, 0.0).sum((1, 2, 3))
        return MaskedSums(error=error, count=hidden.count(error.dtype), channels=self.channels)

    def _normalization(self, pictures: Pictures) -> Normalization:
        mean, std = pictures.constants or (None, None)
        if self.statistics is None:
            return Normalization(mean=mean, std=std)
        with torch.no_grad():
            local = self.statistics(pictures.image)
        return Normalization(mean=mean, std=std, local_mean=local.mean, local_std=local.std)
