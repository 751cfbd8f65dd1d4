"""Between pictures and the network: normalisation and flip on the device, and masks from any grid to tokens.

Letters: b batch, c channels, h w image height and width, gh gw mask grid, th tw token grid.
"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """uint8 pixels -> (x / 255 - mean) / std in fp32, on the image's device.

    The constants are no buffers: an engine that casts buffers to bf16 would round the mean to 8 bits, and every picture with it.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation as (1, c, 1, 1) fp32 tensors; made once per device."""
        if device not in self._on_device:
            shape = (1, len(self.mean), 1, 1)
            with torch.inference_mode(False):  # they outlive an inference mode in which they may be made
                self._on_device[device] = tuple(
                    torch.tensor(values, dtype=torch.float32, device=device).view(shape) for values in (self.mean, self.std)
                )
        return self._on_device[device]

    def forward(self, image: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """uint8 is normalised; a floating image is taken as normalised already and only widened to fp32 (fp64 stays)."""
        if image.is_floating_point():
            return image.to(torch.promote_types(image.dtype, torch.float32))
        mean, std = self.constants(image.device)
        return (image.float() / 255 - mean) / std

    def invert(self, image: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
        """Normalised pixels back to 0..255, rounded and clipped: for pictures that people look at."""
        mean, std = self.constants(image.device)
        return ((image.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def check_image(image: Tensor, in_chans: int) -> None:
    """Raise ValueError unless the image is (b, in_chans, h, w) uint8 or floating with at least one pixel."""
    if image.ndim != 4 or image.shape[1] != in_chans or image.numel() == 0:
        raise ValueError(
            f"image: expected (batch, {in_chans}, height, width) with at least one pixel, got {tuple(image.shape)}."
            " Stack the images along a first axis, channels second."
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(
            f"image: expected uint8 (raw) or floating point (normalised), got {image.dtype}. Convert it with .to(torch.uint8)."
        )


def flip_where(image: Tensor, flip: Bool[Tensor, " b"]) -> Tensor:
    """Mirror left-right the images whose flag is set. (b, c, h, w) -> the same shape and dtype."""
    return torch.where(flip.view(-1, 1, 1, 1), image.flip(-1), image)


def cells_per_axis(*, grid: int, side: int, patch_size: int, axis: str) -> int:
    """How many tokens one mask cell covers along an axis.

    The grid is either the token grid itself (tokens overhang a side that the patch does not divide), or it divides the side into
    cells of whole patches. Anything else is a ValueError.
    """
    if grid == -(-side // patch_size):
        return 1
    if grid > 0 and side % grid == 0 and (side // grid) % patch_size == 0:
        return side // grid // patch_size
    raise ValueError(
        f"mask: a grid of {grid} along the {axis} does not fit {side} pixels in patches of {patch_size}."
        f" Give {-(-side // patch_size)} (one per token), or a divisor of {side} with cells of multiples of {patch_size} pixels."
    )


def mask_to_tokens(mask: Bool[Tensor, "b gh gw"], *, image_size: tuple[int, int], patch_size: int) -> Bool[Tensor, "b th tw"]:
    """Repeat each cell of the mask over the tokens it covers. Raises ValueError for a grid that does not fit the image."""
    for axis, name in ((0, "height"), (1, "width")):
        times = cells_per_axis(grid=mask.shape[axis + 1], side=image_size[axis], patch_size=patch_size, axis=name)
        mask = mask.repeat_interleave(times, dim=axis + 1) if times > 1 else mask
    return mask
