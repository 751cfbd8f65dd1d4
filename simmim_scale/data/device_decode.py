"""Decoding on the GPU (`data.decoder: gpu`): workers send plain JPEGs as they are, nvJPEG decodes them through torchvision.

The views are the same: crops, masks and flips are drawn in the worker, and only decoding and resampling move to the device.
Pixels differ by rounding (nvJPEG's arithmetic, resampling in float32). What is not a plain JPEG (other formats, CMYK, files that
end too early) is decoded in the worker as always, and what the GPU refuses is decoded by the rank, with the same rule of
replacement. Damage that nvJPEG passes over goes unnoticed. Validation is decoded by the workers, so that its losses compare.

Letters: b = samples of the micro-batch, k = those of them that the worker decoded, h, w = height and width, c = channels.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from simmim_scale.data.decode import COLOUR_SPACES, MAX_PIXELS, jpeg_orientation
from simmim_scale.data.transforms import Crop

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
# Start of frame: baseline, extended and progressive Huffman coding.
FRAMES = {0xC0, 0xC1, 0xC2}
OTHER_FRAMES = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
# Entries of a batch that only travel from the worker to the decoder.
TRAVELLING = ("encoded", "encoded_bytes", "crop", "orientation", "epoch")


def plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Height and width as stored, of a JPEG that nvJPEG decodes as libjpeg does: whole, 8 bits, grey or YCbCr; else None."""
    if bytes(data[:2]) != b"\xff\xd8" or bytes(data[-2:]) != b"\xff\xd9":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in OTHER_FRAMES or marker == 0xDA:
            return None
        if marker == 0xEE and bytes(data[at + 4 : at + 9]) == b"Adobe" and length >= 14 and data[at + 15] != 1:
            return None  # stored as RGB or CMYK
        if marker in FRAMES:
            height, width = (int.from_bytes(data[at + start : at + start + 2], "big") for start in (5, 7))
            plain = data[at + 4] == 8 and data[at + 9] in (1, 3) and 0 < height * width <= MAX_PIXELS
            return (height, width) if plain else None
        at += 2 + length
    return None


def encoded_row(data: bytes | memoryview, crop: Crop, entries: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker sends of a sample that the device decodes: `entries` (no image), the file, the crop of the upright image."""
    return {
        **entries,
        "encoded": np.frombuffer(data, np.uint8),
        "crop": np.array([crop.top, crop.left, crop.height, crop.width], dtype=np.int64),
        "orientation": jpeg_orientation(data),
    }


def decoded_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker sends of a sample that it decoded itself: "image" and nothing to decode."""
    return {**row, "encoded": np.empty(0, np.uint8), "crop": np.zeros(4, dtype=np.int64), "orientation": 1}


def pack(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Batch]:
    """Splits off what cannot be stacked: the rows without images and files, and "encoded" (all files, one after the other),
    "encoded_bytes" (b,) and "image" (k, c, h, w), where there are any."""
    files = [torch.from_numpy(np.array(row["encoded"])) for row in rows]
    packed = {"encoded": torch.cat(files), "encoded_bytes": torch.tensor([len(file) for file in files])}
    images = [row["image"] for row in rows if "image" in row]
    if images:
        packed["image"] = torch.stack(images)
    return [{name: value for name, value in row.items() if name not in ("image", "encoded")} for row in rows], packed


class DeviceDecoder:
    """Turns what workers sent into a batch with "image" (b, c, h, w) uint8 on a device.

    Args:
        device: A CUDA device; on the CPU the same is done by torchvision's CPU decoder (for tests).
        image_size: Height and width of the model's input.
        in_chans: 1 or 3.
        interpolation: "bilinear" or "bicubic".

    Raises:
        ValueError: No such device or decoder here, or channels that a JPEG does not have.
    """

    def __init__(self, device: torch.device, *, image_size: tuple[int, int], in_chans: int, interpolation: str):
        if in_chans not in COLOUR_SPACES:
            raise ValueError(f"data.decoder: gpu decodes to 1 or 3 channels, model.in_chans is {in_chans}. Set data.decoder=cpu.")
        self.device = device
        self.image_size = image_size
        self.interpolation = interpolation
        self.mode = "GRAY" if in_chans == 1 else "RGB"
        self.in_chans = in_chans
        self.num_refused = 0
        self._check()

    def __call__(self, batch: Batch) -> tuple[Batch, list[int]]:
        """The batch with images on the device, and the rows that the device refused; their images are still empty."""
        lengths = batch["encoded_bytes"].tolist()
        shape = (len(lengths), self.in_chans, *self.image_size)
        out = torch.zeros(shape, dtype=torch.uint8, device=self.device).contiguous(memory_format=torch.channels_last)
        ready = [row for row, length in enumerate(lengths) if not length]
        if ready:
            out[ready] = batch["image"].to(self.device, non_blocking=True)
        waiting = [row for row, length in enumerate(lengths) if length]
        files = [file for file in batch["encoded"].split(lengths) if len(file)]
        refused = []
        for row, pixels in zip(waiting, self._decode(files), strict=True):
            if pixels is None:
                refused.append(row)
                continue
            crop = Crop(*batch["crop"][row].tolist())
            out[row] = self._view(pixels, crop, int(batch["orientation"][row]))
        return {**{name: value for name, value in batch.items() if name not in TRAVELLING}, "image": out}, refused

    def _decode(self, files: list[Tensor]) -> list[Tensor | None]:
        """(c, h, w) of every file; None for those that the decoder refuses."""
        if not files:
            return []
        try:
            return list(self._decode_all(files))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return [self._decode_one(file) for file in files]

    def _decode_one(self, file: Tensor) -> Tensor | None:
        try:
            return self._decode_all([file])[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.num_refused:
                log.warning("data.decoder: %s refuses a JPEG (%s); such images are decoded by the CPU.", self.device, error)
            self.num_refused += 1
            return None

    def _decode_all(self, files: list[Tensor]) -> list[Tensor]:
        from torchvision.io import decode_jpeg

        with warnings.catch_warnings():
            # torchvision announces another home for its decoders; this is the one that all supported versions have.
            warnings.simplefilter("ignore")
            return decode_jpeg(files, mode=self.mode, device=self.device)

    def _view(self, pixels: UInt8[Tensor, "c h w"], crop: Crop, orientation: int) -> UInt8[Tensor, "c h2 w2"]:
        upright = make_upright(pixels, orientation)
        cut = upright[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        view = interpolate(cut[None].float(), self.image_size, mode=self.interpolation, antialias=True)[0]
        return view.round_().clamp_(0, 255).to(torch.uint8)

    def _check(self) -> None:
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("data.decoder: gpu needs a CUDA device, there is none. Set data.decoder=cpu.")
        sample = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), dtype=np.uint8))
        try:
            self._decode_all([torch.from_numpy(np.frombuffer(sample, np.uint8).copy())])
        except RuntimeError as error:
            raise ValueError(
                f"data.decoder: torchvision cannot decode JPEGs on {self.device} ({error})."
                " Install a torchvision that was built with nvJPEG, or set data.decoder=cpu."
            ) from error


def make_upright(pixels: UInt8[Tensor, "c h w"], orientation: int) -> UInt8[Tensor, "c h2 w2"]:
    """Applies an EXIF orientation: 5 to 8 swap the axes, the others mirror or turn by 180 degrees."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    axes = [*([2] if orientation in (2, 3, 6, 7) else []), *([1] if orientation in (3, 4, 7, 8) else [])]
    return pixels.flip(axes) if axes else pixels
