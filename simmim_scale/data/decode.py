"""From the bytes of an image file to uint8 pixels, the same whatever decodes them.

One behaviour, on purpose:
- JPEG goes to libjpeg-turbo in strict mode, with the exact DCT and smooth chroma upsampling (the same pixels as PIL, faster).
  Damage that costs pixels is a `DecodeError` (PIL would invent them). What else it refuses (CMYK, bytes too many) and every other
  format goes to PIL; what that refuses is a `DecodeError` too.
- The EXIF orientation is applied: people and trees stand upright, as in every image viewer.
- Transparency is dropped, palettes are resolved, and 16-bit values are divided by 256.
- One channel means luma (ITU-R 601), whatever the file had.
- NPY arrays give any number of channels, and so do TIFF files where other than 1 or 3 are asked for, or a range of values
  (`data/bands.py`); a common format gives another number only if it has exactly so many (4 from RGBA).
"""

import io
import struct

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from simmim_scale.data.bands import is_npy, is_tiff, read_npy, read_tiff, to_pixels
from simmim_scale.data.jpeg import is_damage

# Channels -> colour space of the JPEG decoder, mode of PIL.
COLOUR_SPACES = {1: ("GRAY", "L"), 3: ("RGB", "RGB")}
# 179 megapixels: what PIL takes for a decompression bomb, applied to JPEG too (512 MB of pixels).
MAX_PIXELS = 178_956_970
EXIF_ORIENTATION = 0x0112
JPEG_START = b"\xff\xd8"


class DecodeError(ValueError):
    """The bytes are no image that can be decoded; the message says why."""


def decode_image(
    data: bytes | memoryview, *, in_chans: int = 3, band_range: tuple[float, float] | None = None
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image file.

    Args:
        data: The whole file.
        in_chans: 3 for RGB, 1 for luma, others for images that have so many bands.
        band_range: Values of NPY and multi-band TIFF files that become 0 and 255; None: those of 8 or 16 bits.

    Returns:
        Pixels, contiguous, upright.

    Raises:
        DecodeError: Damaged, truncated, unknown format, too many pixels.
        ModuleNotFoundError: A multi-band TIFF, and tifffile is not installed.
    """
    if is_npy(data) or (is_tiff(data) and (in_chans not in COLOUR_SPACES or band_range is not None)):
        return _decode_bands(data, in_chans, band_range)
    if bytes(data[:2]) == JPEG_START and in_chans in COLOUR_SPACES:
        image = _decode_jpeg(data, in_chans)
        if image is not None:
            return image
    return _decode_any(data, in_chans)


def jpeg_orientation(data: bytes | memoryview) -> int:
    """EXIF orientation of a JPEG, 1 to 8; 1 (upright) where there is none or it makes no sense. Reads segment headers only."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xDA, 0xD9):  # start of scan, end of image: no more headers
            break
        if marker == 0xE1 and bytes(data[at + 4 : at + 10]) == b"Exif\0\0":
            return _tiff_orientation(bytes(data[at + 10 : at + 2 + length]))
        at += 2 + length
    return 1


def _decode_jpeg(data: bytes | memoryview, in_chans: int) -> np.ndarray | None:
    """Pixels, or None where the strict decoder cannot say whether the file is damaged."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        image = simplejpeg.decode_jpeg(data, COLOUR_SPACES[in_chans][0], fastdct=False, fastupsample=False)
    except DecodeError:
        raise
    except ValueError as error:
        if is_damage(error):
            raise DecodeError(str(error)) from error
        return None
    return np.ascontiguousarray(_upright(image, jpeg_orientation(data)))


def _decode_any(data: bytes | memoryview, in_chans: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(*image.size)
            image.load()
            pixels = np.array(_with_channels(_eight_bit(image), in_chans))
            orientation = _orientation(image, data)
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("the content is of no known image format") from error
    except Exception as error:  # PIL's readers raise nearly anything on damaged files: SyntaxError, struct.error, KeyError ...
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    return np.ascontiguousarray(_upright(pixels.reshape(*pixels.shape[:2], in_chans), orientation))


def _decode_bands(data: bytes | memoryview, in_chans: int, band_range: tuple[float, float] | None) -> np.ndarray:
    try:
        array = read_npy(data) if is_npy(data) else read_tiff(data, max_values=MAX_PIXELS * in_chans)
        return to_pixels(array, in_chans=in_chans, band_range=band_range)
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # tifffile and numpy raise nearly anything on damaged files
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _with_channels(image: Image.Image, in_chans: int) -> Image.Image:
    if in_chans in COLOUR_SPACES:
        return image.convert(COLOUR_SPACES[in_chans][1])
    if len(image.getbands()) != in_chans:
        raise DecodeError(f"the image has {len(image.getbands())} channels, model.in_chans is {in_chans}")
    return image


def _orientation(image: Image.Image, data: bytes | memoryview) -> int:
    """EXIF orientation of a loaded image. Damaged EXIF data do not make an image unusable: upright."""
    if image.format in ("JPEG", "MPO"):
        return jpeg_orientation(data)
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - as above, the parser raises nearly anything
        return 1
    return value if value in range(1, 9) else 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey levels divided by 256 (PIL's own conversion would clip them at 255); other images as they are."""
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no known range; store the image with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DecodeError(f"grey levels from {values.min()} to {values.max()}, expected 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}; it may be a decompression bomb")


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation to (h, w, c): 5 to 8 swap the axes, the others mirror or turn by 180 degrees."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


def _tiff_orientation(tiff: bytes) -> int:
    """The orientation in the first directory of a TIFF header."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == EXIF_ORIENTATION and kind == 3:  # 3: a 16-bit number
                (value,) = struct.unpack_from(order + "H", tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
