"""What targets of classes share: chunked cross-entropy over hidden pixels, a summary of the likeliest classes, a baseline.

Letters: b batch, c channels, h w picture height and width, g groups that are classified apart, q classes, rh rw predicted rows
and columns, k tokens of each image, p = patch^2 pixels of a token.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simmim_scale.objectives.cross_entropy import Classes, hidden_cross_entropy, most_likely
from simmim_scale.objectives.masked_loss import MaskedSums
from simmim_scale.objectives.prediction import Hidden, Pictures, Prediction, take_patches, to_picture
from simmim_scale.objectives.targets import Target

MIB = 1 << 20


class ClassTarget(Target):
    """Every predicted pixel has one of `classes` in each of `groups` groups; the loss is the mean cross-entropy.

    Args:
        groups, classes: as above; the head gives groups * classes numbers for a predicted pixel, group by group.
        logits_mib: most memory of logits at once, MiB of fp32.
    """

    def __init__(self, *, groups: int, classes: int, logits_mib: int) -> None:
        super().__init__()
        self.channels = groups * classes
        self.classes = Classes(groups, classes, logits_mib * MIB)

    def labels(self, pictures: Pictures) -> Int[Tensor, "b g rh rw"]:
        """The true classes."""
        raise NotImplementedError

    def sums(self, prediction: Prediction, pictures: Pictures, hidden: Hidden) -> MaskedSums:
        """Cross-entropy in nats."""
        with torch.no_grad():
            labels = take_patches(self.labels(pictures), prediction)
            mask = take_patches(hidden.pixels(), prediction)
        batch, count = labels.shape[:2]
        labels = labels.reshape(batch * count, self.classes.groups, -1)
        error = prediction.consume(
            lambda inputs, weight, bias: hidden_cross_entropy(
                inputs.flatten(0, 1), weight, bias, labels, mask.flatten(0, 1), self.classes
            )
        )
        error = error.view(batch, count).sum(1)
        return MaskedSums(error=error, count=hidden.count(error.dtype), channels=self.classes.groups)

    @torch.no_grad()
    def summary(self, prediction: Prediction, size: tuple[int, int]) -> Int[Tensor, "b g rh rw"]:
        """The likeliest class of every group and pixel."""
        found = prediction.consume(lambda inputs, weight, bias: most_likely(inputs.flatten(0, 1), weight, bias, self.classes))
        patches = found.view(len(prediction.inputs), -1, found.shape[1] * found.shape[2])
        return to_picture(patches, grid=prediction.grid, patch=prediction.patch, size=size)

    @torch.no_grad()
    def baseline(self, pictures: Pictures, hidden: Hidden) -> MaskedSums:
        """Cross-entropy of the frequencies of the visible pixels' classes; one more pixel is spread over all classes, so that
        none is impossible."""
        labels, mask = self.labels(pictures).flatten(2).long(), hidden.pixels().flatten(2)
        seen = torch.zeros(*labels.shape[:2], self.classes.count, device=labels.device)
        seen.scatter_add_(2, labels, (~mask).expand_as(labels).float())
        logs = ((seen + 1 / self.classes.count) / (seen.sum(2, keepdim=True) + 1)).log()
        error = (-logs.gather(2, labels)).masked_fill(~mask, 0.0).sum((1, 2))
        return MaskedSums(error=error, count=hidden.count(error.dtype), channels=self.classes.groups)


def shares(pictures: Pictures, norm: tuple[Tensor, Tensor], scale: int) -> Float[Tensor, "b c rh rw"]:
    """Pixels as shares of 255, averaged over squares of `scale`; fp64, so that bytes at the border of two bins are told apart.

    Args:
        norm: (1, c, 1, 1) mean and std, to undo the normalisation of floating pictures.
    """
    if pictures.stored.is_floating_point():
        values = (pictures.image.double() * norm[1] + norm[0]).clamp(0, 1) * 255
    else:
        stored, flip = pictures.stored, pictures.flip
        values = (stored if flip is None else torch.where(flip.view(-1, 1, 1, 1), stored.flip(3), stored)).double()
    b, c, h, w = values.shape
    if h % scale or w % scale:
        raise ValueError(f"image: {h}x{w} pixels do not divide into predicted pixels of {scale}. Choose multiples of {scale}.")
    sums = values.reshape(b, c, h // scale, scale, w // scale, scale).sum((3, 5))
    return sums / (255 * scale**2)
