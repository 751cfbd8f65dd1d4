"""What passes between backbone, head and target: pictures, what is hidden of them, and a prediction that is computed when asked.

Letters: b batch, c channels, h w picture height and width, k tokens of each image, d width of a token, l numbers that the head
gives for a token, rh rw predicted pixels, mh mw units of the mask, th tw tokens of the last stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor, nn


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures.

    Attributes:
        image: normalised, flipped where asked, fp32.
        stored: the same as it came: uint8, or floating and normalised; not flipped.
        flip: which of `stored` are mirrored in `image`; None: none.
        constants: (c,) mean and std that normalise `stored` as shares of 255; None: it is normalised.
        view: another view of the same crops, flipped like `image`, for targets that ask for one.
    """

    image: Float[Tensor, "b c h w"]
    stored: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]
    flip: Bool[Tensor, " b"] | None
    constants: tuple[Float[Tensor, " c"], Float[Tensor, " c"]] | None
    view: UInt8[Tensor, "b c vh vw"] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[2], self.image.shape[3]


@dataclass(frozen=True)
class Hidden:
    """Which predicted pixels are hidden: units of `cell` predicted pixels per side over a picture of `size` of them. The last
    units may overhang it."""

    mask: Bool[Tensor, "b mh mw"]
    cell: int
    size: tuple[int, int]

    def pixels(self) -> Bool[Tensor, "b 1 rh rw"]:
        """One flag per predicted pixel."""
        pixels = self.mask.repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2)
        return pixels[:, None, : self.size[0], : self.size[1]]

    def count(self, dtype: torch.dtype) -> Float[Tensor, " b"]:
        """Hidden predicted pixels of each image."""
        # Units at the end count only the pixels that lie in the picture.
        height, width = (
            (side - self.cell * torch.arange(units, device=self.mask.device)).clamp(0, self.cell).to(dtype)
            for side, units in zip(self.size, self.mask.shape[1:], strict=True)
        )
        return (self.mask * height[:, None] * width).sum((1, 2))


# (inputs (*, d), weight (l, d) or None, bias (l,) or None) -> anything: is handed the last linear map instead of its outputs.
# Without a weight the inputs are the outputs.
Consumer = Callable[[Tensor, Tensor | None, Tensor | None], Any]


# The last linear map of a head, or what stands for it: (inputs, consumer or None) -> outputs, or what the consumer returns.
Project = Callable[..., Any]


def identity(inputs: Tensor, consume: Consumer | None = None) -> Any:
    """The projection of a head that gives its outputs at once."""
    return inputs if consume is None else consume(inputs, None, None)


class Prediction:
    """What a head says of k tokens of each image; computed on first use, or handed to the target piece by piece.

    Args:
        inputs: of the projection.
        project: to the l = channels * patch^2 numbers of a token, in the order of the published convolution and pixel shuffle.
        tokens: number of each token in the grid; None: all, in order.
        grid: rows and columns of tokens.
        patch: predicted pixels per token and side.
    """

    def __init__(
        self,
        inputs: Float[Tensor, "b k d"],
        project: Project,
        *,
        tokens: Int[Tensor, "b k"] | None,
        grid: tuple[int, int],
        patch: int,
    ) -> None:
        self.inputs, self.project, self.tokens, self.grid, self.patch = inputs, project, tokens, grid, patch

    @cached_property
    def values(self) -> Float[Tensor, "b k l"]:
        """All numbers at once."""
        return self.project(self.inputs)

    def consume(self, consumer: Consumer) -> Any:
        """What `consumer` makes of the projection's inputs and weights; for predictions too large to exist at once."""
        return self.project(self.inputs, consumer)

    def picture(self, size: tuple[int, int]) -> Float[Tensor, "b o rh rw"]:
        """The values as a picture, cut to `size`; only for all tokens."""
        return to_picture(self.values, grid=self.grid, patch=self.patch, size=size)


def to_picture(
    values: Shaped[Tensor, "b k l"], *, grid: tuple[int, int], patch: int, size: tuple[int, int] | None = None
) -> Shaped[Tensor, "b o rh rw"]:
    """Patches of all tokens put in their places; `size`: cut to so many rows and columns."""
    b, (rows, columns) = len(values), grid
    cut = values.view(b, rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    picture = cut.reshape(b, -1, rows * patch, columns * patch)
    return picture if size is None else picture[:, :, : size[0], : size[1]]


def to_patches(picture: Shaped[Tensor, "b o ph pw"], *, patch: int) -> Shaped[Tensor, "b k l"]:
    """The inverse of `to_picture`."""
    b, o, height, width = picture.shape
    rows, columns = height // patch, width // patch
    return picture.reshape(b, o, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)


def take_patches(picture: Tensor, prediction: Prediction) -> Tensor:
    """(b, o, rh, rw) -> (b, k, o * patch^2): the patches that a prediction is about. Beyond the picture they are 0 (False)."""
    height, width = (tokens * prediction.patch for tokens in prediction.grid)
    below, right = height - picture.shape[2], width - picture.shape[3]
    if below or right:
        picture = F.pad(picture, (0, right, 0, below))
    patches = to_patches(picture, patch=prediction.patch)
    if prediction.tokens is None:
        return patches
    return patches.gather(1, prediction.tokens[..., None].expand(-1, -1, patches.shape[2]))


def predict(head: nn.Module, features: Float[Tensor, "b th tw d"], *, patch: int, tokens: Tensor | None) -> Prediction:
    """Ask a head. One that has `trunk` and `proj` is asked for these tokens alone; any other is called for a whole picture.

    Args:
        patch: predicted pixels per token of the features and side.
        tokens: (b, k) numbers of tokens, only for a head that is `tokenwise`; None: all.
    """
    b, rows, columns, width = features.shape
    if not hasattr(head, "trunk"):
        values = to_patches(head(features), patch=patch)
        return Prediction(values, identity, tokens=None, grid=(rows, columns), patch=patch)
    if tokens is not None:
        flat = features.reshape(b, rows * columns, width)
        chosen = flat.gather(1, tokens[..., None].expand(-1, -1, width))
        return Prediction(head.trunk(chosen), head.proj, tokens=tokens, grid=(rows, columns), patch=patch)
    inputs = head.trunk(features)
    return Prediction(inputs.flatten(1, 2), head.proj, tokens=None, grid=(inputs.shape[1], inputs.shape[2]), patch=head.patch)


@dataclass(frozen=True)
class Meeting:
    """How the tokens of the last stage meet the predicted pixels: each predicts `patch` x `patch` of them, after `pool` x `pool`
    tokens were averaged to one, or after all were resampled to `grid`."""

    patch: int
    pool: int = 1
    grid: tuple[int, int] | None = None

    def features(self, features: Float[Tensor, "b th tw d"]) -> Float[Tensor, "b th2 tw2 d"]:
        """Tokens, one for each patch."""
        if self.grid is not None:
            maps = F.interpolate(features.permute(0, 3, 1, 2), self.grid, mode="bilinear", align_corners=False)
            return maps.permute(0, 2, 3, 1)
        if self.pool == 1:
            return features
        return F.avg_pool2d(features.permute(0, 3, 1, 2), self.pool, ceil_mode=True).permute(0, 2, 3, 1)

    @property
    def one_to_one(self) -> bool:
        """Whether each token predicts by itself the pixels that it covers."""
        return self.pool == 1 and self.grid is None


def meet(*, stride: int, scale: int, grid: tuple[int, int] | None = None) -> Meeting:
    """How features with `stride` image pixels per token meet predicted pixels of `scale` image pixels, or those of a `grid`.

    Raises:
        ValueError: neither divides the other.
    """
    if grid is not None:
        return Meeting(patch=1, grid=grid)
    if stride % scale == 0:
        return Meeting(patch=stride // scale)
    if scale % stride == 0:
        return Meeting(patch=1, pool=scale // stride)
    raise ValueError(
        f"objective.downsample: a predicted pixel of {scale} image pixels does not fit the backbone's stride of {stride}."
        f" Choose a divisor or a multiple of {stride}."
    )


def hide(
    mask: Bool[Tensor, "b mh mw"], *, patch_size: int, scale: int, size: tuple[int, int], grid: Sequence[int] | None
) -> Hidden:
    """The mask of the embedding's tokens as one of predicted pixels.

    Args:
        patch_size: image pixels per unit of `mask` and side.
        scale: image pixels per predicted pixel and side.
        size: of the image.
        grid: predicted rows and columns, where `scale` does not give them: such a pixel is hidden where its centre is.
    """
    if grid is not None:
        rows, columns = (_centres(count, side, patch_size, mask.device) for count, side in zip(grid, size, strict=True))
        return Hidden(mask[:, rows][:, :, columns], cell=1, size=(grid[0], grid[1]))
    predicted = (-(-size[0] // scale), -(-size[1] // scale))
    if patch_size % scale == 0:
        return Hidden(mask, cell=patch_size // scale, size=predicted)
    step = scale // patch_size  # a predicted pixel lies in one cell of the mask: its first unit tells
    return Hidden(mask[:, ::step, ::step], cell=1, size=predicted)


def _centres(count: int, side: int, patch_size: int, device: torch.device) -> Int[Tensor, " n"]:
    return ((torch.arange(count, device=device) * 2 + 1) * side // (2 * count)) // patch_size
