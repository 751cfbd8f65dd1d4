"""Targets and masks cut into patches, in the order of the prediction. Shared by the PyTorch forms.

Letters as in the contract; n = chosen patches of a batch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from simmim_scale.kernels.masked_loss import Layout, Normalization


def cut_patches(picture: Tensor, layout: Layout) -> Tensor:
    """(b, c, h, w) -> a view (b, rows, columns, c, s, s); sides that the patch does not divide are padded with zeros."""
    (rows, columns), s = layout.grid, layout.patch
    below, right = rows * s - picture.shape[2], columns * s - picture.shape[3]
    if below or right:
        picture = F.pad(picture, (0, right, 0, below))
    b, c = picture.shape[:2]
    return picture.reshape(b, c, rows, s, columns, s).permute(0, 2, 4, 1, 3, 5)


def hidden_pixels(mask: Bool[Tensor, "b mh mw"], layout: Layout, *, size: tuple[int, int]) -> Bool[Tensor, "b r q 1 s s"]:
    """The mask of every pixel of every patch, False beyond the picture."""
    pixels = mask.repeat_interleave(layout.cell, 1).repeat_interleave(layout.cell, 2)[:, None, : size[0], : size[1]]
    return cut_patches(pixels, layout)


class Targets:
    """Target patches of any choice of tokens: normalised only where they are asked for."""

    def __init__(self, image: Tensor, layout: Layout, flip: Tensor | None, normalization: Normalization) -> None:
        if flip is not None:
            image = torch.where(flip.view(-1, 1, 1, 1), image.flip(-1), image)
        self.image, self.normalization = cut_patches(image, layout), normalization
        local = (normalization.local_mean, normalization.local_std)
        self.local = None if local[0] is None else tuple(cut_patches(part, layout) for part in local)

    def take(self, image: Int[Tensor, " n"], row: Int[Tensor, " n"], column: Int[Tensor, " n"]) -> Float[Tensor, "n l"]:
        """Patches at (image, row, column), at least fp32."""
        target = self.image[image, row, column]
        if self.normalization.mean is not None:
            mean, std = (part.view(1, -1, 1, 1) for part in (self.normalization.mean, self.normalization.std))
            target = (target.float() / 255 - mean) / std
        elif target.dtype != torch.float64:
            target = target.float()
        if self.local is not None:
            mean, std = (part[image, row, column] for part in self.local)
            target = ((target - mean) / std).to(target.dtype)
        return target.flatten(1)


def places(
    tokens: Int[Tensor, "b k"] | None, *, batch: int, layout: Layout, device: torch.device
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Image, row and column of every patch of the prediction, n = b * k."""
    rows, columns = layout.grid
    if tokens is None:
        tokens = torch.arange(rows * columns, device=device).expand(batch, -1)
    image = torch.arange(batch, device=device)[:, None].expand_as(tokens)
    return image.reshape(-1), (tokens // columns).reshape(-1), (tokens % columns).reshape(-1)
