"""What kind of image some bytes are, and whether they decode. Looks at content, never at a file's name."""

import io
import re
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_tools.arrays import array_shape, check_pages, is_array
from simmim_scale.data.bands import read_tiff
from simmim_scale.data.jpeg import is_damage

# More is taken for a decompression bomb, here as in training (`simmim_scale/data/decode.py`): 512 MB of pixels.
MAX_PIXELS = 178_956_970
MOST_BANDS = 256

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tif"),
    (b"MM\x00*", "tif"),
    (b"P5", "pgm"),
    (b"P6", "ppm"),
    (b"\x93NUMPY", "npy"),
)
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}
CHECKS = ("structure", "full", "header")

# What Pillow's readers raise on damaged bytes, as found by feeding them some (tests/data_tools/test_images.py).
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)

# JPEG (ITU-T T.81, table B.1): the next marker in coded data, which is neither a stuffed 0xFF nor a restart marker.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _END = 0xDA, 0xD9
# Coded data hardly ever hold so many zeros; a block of them is what an interrupted copy or a bad disk leaves.
_HOLE = bytes(64)


class ImageError(Exception):
    """An image that cannot be used; the message is the cause."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Extension by content, and size in pixels as stored (before any EXIF rotation)."""

    extension: str
    width: int
    height: int


def sniff(data: bytes) -> str:
    """Extension of an image by its first bytes.

    Raises:
        ImageError: Empty, or of no kind that is known.
    """
    if not data:
        raise ImageError("the file is empty")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for signature, extension in _SIGNATURES:
        if data.startswith(signature):
            return extension
    raise ImageError(f"no known image format (it starts with {data[:8].hex(' ')})")


def check_image(data: bytes, check: str = "full") -> ImageFacts:
    """What an image is, if it can be used.

    Args:
        data: The whole file.
        check: "full" decodes it as training will (JPEGs strictly, then by Pillow); "structure" follows a JPEG's segments and
            scans to its end and compares a PNG's checksums, which finds what is cut off, overwritten or has holes, and
            decodes what looks odd and all other formats; "header" trusts what follows the header.

    Raises:
        ImageError: Why it cannot be used.
    """
    extension = sniff(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large but allowed images, odd metadata
            width, height = _size(data, extension)
            if is_array(data, extension):  # its size was compared with that of its data
                if check == "full" and extension == "tif":
                    _decode_bands(data)
            elif check == "full" or (check == "structure" and not _is_whole(data, extension)):
                _decode(data, extension)
    except DECODER_ERRORS as error:
        raise ImageError(cause_of(error)) from error
    return ImageFacts(extension, width, height)


def check_map(data: bytes, largest: int, check: str) -> None:
    """Whether a PNG that decodes is a map of classes: grey, 8 bits, values from 0 to `largest` (not looked at for "header").

    Raises:
        ImageError: What it is instead.
    """
    bits, colour = data[24], data[25]  # of IHDR (PNG, third edition, 11.2.1)
    if (bits, colour) != (8, 0):
        raise ImageError(f"has {_PNG_COLOURS.get(colour, '?')} pixels of {bits} bits, expected grey of 8 bits")
    if check == "header":
        return
    try:
        with Image.open(io.BytesIO(data)) as image:
            found = int(np.asarray(image).max())
    except DECODER_ERRORS as error:
        raise ImageError(cause_of(error)) from error
    if found > largest:
        raise ImageError(f"has the value {found}, expected 0 to {largest}")


def cause_of(error: Exception) -> str:
    """What a decoder's error says, the same in every run: Pillow names the address of what it cannot identify."""
    return (
        "the content is of no known image format"
        if isinstance(error, UnidentifiedImageError)
        else f"{type(error).__name__}: {error}"
    )


def _size(data: bytes, extension: str) -> tuple[int, int]:
    if is_array(data, extension):
        height, width = array_shape(data, extension)[:2]
    else:
        width, height = _jpeg_size(data) if extension == "jpg" else (0, 0)
    if not width or not height:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    _check_pixels(width, height)
    return width, height


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}: it could be a decompression bomb; make it smaller")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(width, height) by the fast decoder, (0, 0) if it refuses the header."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return 0, 0
    return width, height


def _decode(data: bytes, extension: str) -> None:
    if extension == "jpg" and _decodes_strictly(data):
        return
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB")
        if extension == "tif":
            check_pages(data)
            _load_pages(image)


def _load_pages(image: Image.Image) -> None:
    """The pages after the first, which may be bands."""
    for page in range(1, min(getattr(image, "n_frames", 1), MOST_BANDS)):
        image.seek(page)
        _check_pixels(*image.size)
        image.load()


def _decodes_strictly(data: bytes) -> bool:
    """Whether the strict decoder takes it. It is asked for a small grey picture, which reads all data but computes little.

    Raises:
        ImageError: Pixels are lost.
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, strict=True)
    except ValueError as error:
        if is_damage(error):
            raise ImageError(str(error)) from error
        return False
    return True


def _decode_bands(data: bytes) -> None:
    """Reads a TIFF of many bands, where tifffile is installed; training needs it for such files too."""
    try:
        read_tiff(data, max_values=MAX_PIXELS * MOST_BANDS)
    except (ModuleNotFoundError, MemoryError):
        pass
    except Exception as error:  # tifffile raises nearly anything on damaged files
        raise ImageError(cause_of(error)) from error


def _is_whole(data: bytes, extension: str) -> bool:
    """Whether the structure leaves no doubt; what it does leave is for the decoder to decide."""
    if extension == "jpg":
        return _jpeg_is_whole(data)
    if extension == "png":
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
        return True
    return False


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether a JPEG is a chain of segments with a frame and scans up to its end marker, without holes."""
    at, framed, scan = 2, False, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        framed |= marker in _FRAMES
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2 or marker < 0xC0:
            return False
        at += 2 + length
        if marker == _SCAN:
            scan = scan or at
            found = _NEXT_MARKER.search(data, at)
            if found is None:
                return False
            at = found.start()
            if data[at + 1] == _END:
                return framed and data.find(_HOLE, scan, at) < 0
    return False
