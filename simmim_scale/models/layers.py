"""Layers that both Swins share: patch embedding, patch merging, MLP, linear maps that are born without random numbers.

Letters: b batch, c channels, h w tokens per axis.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.models.norms import TokenNorm


class Linear(nn.Linear):
    """`nn.Linear` whose construction draws nothing: `init_weights` gives the values, until then they are NaN so that a forgotten
    one is loud."""

    def reset_parameters(self) -> None:
        fill_nan(self)


class PatchConv(nn.Conv2d):
    """`nn.Conv2d` whose construction draws nothing; see `Linear`."""

    def reset_parameters(self) -> None:
        fill_nan(self)


def fill_nan(module: nn.Module) -> None:
    """Set a module's own parameters to NaN, which marks them as not initialised."""
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.fill_(float("nan"))


class PatchEmbed(nn.Module):
    """Image to tokens: a convolution with stride = patch size, then LayerNorm.

    Args:
        patch_size: pixels per token and axis; an image that it does not divide is padded with zeros at the right and bottom.
        in_chans: channels of the image.
        dim: channels of a token.
    """

    def __init__(self, *, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size, self.in_chans = patch_size, in_chans
        self.proj = PatchConv(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = TokenNorm(dim)

    def forward(self, image: Float[Tensor, "b chans height width"]) -> Float[Tensor, "b h w c"]:
        """Tokens, channels last. The image is cast to the type of the weights, since it may come in fp32 to a bf16 model."""
        if image.dim() != 4 or image.shape[1] != self.in_chans:
            raise ValueError(
                f"image: expected (batch, {self.in_chans}, height, width), got {tuple(image.shape)}."
                " Put channels second, or set model.in_chans to the number of channels."
            )
        image = pad_axes(image, 2, 3, self.patch_size, self.patch_size).to(self.proj.weight.dtype)
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halves each side and doubles the channels: 2x2 tokens are concatenated and projected. Odd sides are padded with zeros.

    Args:
        dim: channels of the input.
        norm_first: V1 normalises the 4 * dim concatenated channels, V2 the 2 * dim projected ones.
    """

    def __init__(self, dim: int, *, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = TokenNorm(4 * dim if norm_first else 2 * dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 c2"]:
        """(b, h, w, c) -> (b, ceil(h / 2), ceil(w / 2), 2c)."""
        x = pad_axes(x, 1, 2, 2, 2)
        batch, height, width, channels = x.shape
        # Order of the concatenation as published: (row, column) = (0, 0), (1, 0), (0, 1), (1, 1).
        quads = x.reshape(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        quads = quads.reshape(batch, height // 2, width // 2, 4 * channels)
        return self.reduction(self.norm(quads)) if self.norm_first else self.norm(self.reduction(quads))


class Mlp(nn.Module):
    """Two linear maps with a GELU between, on the last axis."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*tokens c"]) -> Float[Tensor, "*tokens c"]:
        """Same shape as the input."""
        return self.fc2(F.gelu(self.fc1(x)))


def pad_axes(x: Tensor, rows: int, columns: int, row_multiple: int, column_multiple: int) -> Tensor:
    """Zeros at the end of axes `rows` and `columns` (neighbours, rows first) up to multiples; the input itself where none are
    needed."""
    bottom, right = -x.shape[rows] % row_multiple, -x.shape[columns] % column_multiple
    if not (bottom or right):
        return x
    return F.pad(x, (0, 0) * (x.dim() - 1 - columns) + (0, right, 0, bottom))
