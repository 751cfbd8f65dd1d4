"""The error between predicted patches and the picture in place, over hidden pixels only: the contract; the forms are beside it.

Letters: b batch, k tokens of each image, c channels, h w picture height and width, s pixels of a patch per side, l = c * s * s
numbers of a patch (channel, row, column), mh mw units of the mask.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from simmim_scale.kernels.dispatch import choose

LOSSES = ("l1", "smooth_l1", "l2")


@dataclass(frozen=True)
class Normalization:
    """How stored pixels become the target; each part may be missing.

    Attributes:
        mean, std: (c,) fp32, of pixels as shares of 255: (x / 255 - mean) / std. None: pixels are taken as they are.
        local_mean, local_std: (b, c, h, w), of the normalised picture after the flip: (x - local_mean) / local_std, computed in
            their type (fp64 keeps small differences of flat pictures).
    """

    mean: Float[Tensor, " c"] | None = None
    std: Float[Tensor, " c"] | None = None
    local_mean: Float[Tensor, "b c h w"] | None = None
    local_std: Float[Tensor, "b c h w"] | None = None


@dataclass(frozen=True)
class Layout:
    """Where patches lie: `grid` tokens (rows, columns), each with `patch` pixels per side, under a mask with `cell` pixels per
    unit and side. The last row and column may overhang the picture; what overhangs is no part of the loss."""

    grid: tuple[int, int]
    patch: int
    cell: int


def masked_loss(
    prediction: Float[Tensor, "b k l"],
    image: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b mh mw"],
    *,
    layout: Layout,
    tokens: Int[Tensor, "b k"] | None = None,
    flip: Bool[Tensor, " b"] | None = None,
    normalization: Normalization = Normalization(),
    loss: str = "l1",
    beta: float = 1.0,
    implementation: str = "auto",
) -> Float[Tensor, " b"]:
    """Sum of the error over the hidden pixels and all channels of each image; differentiable in the prediction.

    The published loss is this sum over a batch / (hidden pixels of one channel + 1e-5) / channels.

    Args:
        prediction: patches, in the order of the published 1x1 convolution and pixel shuffle.
        image: as stored; any memory format.
        mask: True where hidden.
        tokens: number of each patch in the row-major grid, distinct within an image; None: all, in order.
        flip: images that are mirrored left-right before they are compared. The mask is that of the mirrored picture.
        loss: "l1" |d|; "l2" d^2; "smooth_l1" d^2 / (2 beta) below beta and |d| - beta / 2 above.
        implementation: "auto" or a name of `kernels/dispatch.py`.

    Returns:
        (b,) fp32 (fp64 for an fp64 prediction). Pixels are summed per patch, then patches, in a fixed order: the same input gives
        the same digits.

    Raises:
        ValueError: shapes that disagree, an unknown loss, or an implementation that cannot run here.
    """
    _check(prediction, image, mask, layout, tokens, loss, beta)
    choice = choose("masked_loss", implementation, device=prediction.device, dtype=prediction.dtype)
    return choice.function(
        prediction, image, mask, layout=layout, tokens=tokens, flip=flip, normalization=normalization, loss=loss, beta=beta
    )


def _check(
    prediction: Tensor, image: Tensor, mask: Tensor, layout: Layout, tokens: Tensor | None, loss: str, beta: float
) -> None:
    channels, height, width = image.shape[1:]
    rows, columns = layout.grid
    if loss not in LOSSES:
        raise ValueError(f"loss: unknown name {loss!r}. Known: {', '.join(LOSSES)}.")
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta}. For a beta of 0 use l1.")
    if prediction.shape[2] != channels * layout.patch**2:
        raise ValueError(
            f"masked_loss: a patch of {layout.patch}x{layout.patch} pixels and {channels} channels has"
            f" {channels * layout.patch**2} numbers, the prediction has {prediction.shape[2]}. Use a head for these channels."
        )
    if tokens is None and prediction.shape[1] != rows * columns:
        raise ValueError(f"masked_loss: {prediction.shape[1]} patches for a grid of {rows}x{columns}. Say which with `tokens`.")
    if rows * layout.patch < height or columns * layout.patch < width:
        raise ValueError(f"masked_loss: {rows}x{columns} patches of {layout.patch} do not cover {height}x{width} pixels.")
    if mask.shape[1] * layout.cell < height or mask.shape[2] * layout.cell < width:
        raise ValueError(
            f"masked_loss: {mask.shape[1]}x{mask.shape[2]} units of {layout.cell} do not cover {height}x{width} pixels."
        )
