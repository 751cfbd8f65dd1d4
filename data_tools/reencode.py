"""Making images smaller: `--max-side` and `--quality`. Pure: equal bytes, options and library versions give equal bytes."""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
from PIL import Image

from data_tools.images import DECODER_ERRORS, ImageError, cause_of

DEFAULT_QUALITY = 90
_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Reencoding:
    """How images are written anew.

    Args:
        max_side: Shrink to at most this many pixels on the longer side; None: keep the size.
        quality: JPEG quality, 1 to 100, of every image; None: only those that are shrunk, at `DEFAULT_QUALITY`.
    """

    max_side: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"--max-side: at least 1 pixel, got {self.max_side}.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"--quality: 1 to 100, got {self.quality}. 90 is hardly visible.")

    def __bool__(self) -> bool:
        return self.max_side is not None or self.quality is not None

    def facts(self) -> dict[str, Any]:
        """What determines the bytes."""
        encoder = f"Pillow {PIL.__version__}" if self else None
        return {"max_side": self.max_side, "quality": self.quality, "encoder": encoder}

    def target(self, width: int, height: int) -> tuple[int, int] | None:
        """(width, height) to write, or None if the bytes stay as they are."""
        longer = max(width, height)
        if self.max_side is None or longer <= self.max_side:
            return (width, height) if self.quality is not None else None
        return max(1, round(width * self.max_side / longer)), max(1, round(height * self.max_side / longer))


def reencode(data: bytes, size: tuple[int, int], reencoding: Reencoding) -> bytes:
    """A JPEG of `size` (width, height): grey stays grey, all else becomes RGB, without alpha and metadata but the orientation.

    Raises:
        ImageError: It does not decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                orientation = image.getexif().get(_ORIENTATION, 1)
                pixels = _eight_bit(image)
            if pixels.size != size:
                pixels = pixels.resize(size, Image.Resampling.LANCZOS)
            return _encode(pixels, reencoding.quality or DEFAULT_QUALITY, orientation)
    except DECODER_ERRORS as error:
        raise ImageError(cause_of(error)) from error


def resize_map(data: bytes, size: tuple[int, int]) -> bytes:
    """A PNG map of classes at another size; values are never mixed.

    Raises:
        ImageError: It does not decode.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            resized = image.resize(size, Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        resized.save(buffer, "PNG")
    except DECODER_ERRORS as error:
        raise ImageError(f"the map: {cause_of(error)}") from error
    return buffer.getvalue()


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range; store the image with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _encode(pixels: Image.Image, quality: int, orientation: Any) -> bytes:
    exif = Image.Exif()
    if orientation in range(2, 9):
        exif[_ORIENTATION] = orientation
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=quality, exif=exif.tobytes() if len(exif) else b"")
    return buffer.getvalue()
