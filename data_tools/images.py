"""What kind of image some bytes are, and whether they decode. Looks at content, never at a file's name."""

import io
import struct
import warnings

import simplejpeg
from PIL import Image

MAX_PIXELS = 2**28  # 16384 x 16384; an image beyond it would take gigabytes in every loader process

_SIGNATURES = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tif"),
    (b"MM\x00*", "tif"),
    (b"P5", "pgm"),
    (b"P6", "ppm"),
)
CHECKS = ("full", "header")

# What Pillow's readers raise on damaged bytes, as found by feeding them some (tests/data_tools/test_images.py).
_DECODER_ERRORS = (
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


class ImageError(Exception):
    """An image that cannot be used; the message is the cause."""


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


def check_image(data: bytes, check: str = "full") -> str:
    """Extension of an image that can be used.

    Args:
        data: The whole file.
        check: "full" decodes it as training will (JPEGs strictly, then by Pillow); "header" trusts what follows the header.

    Raises:
        ImageError: Why it cannot be used.
    """
    extension = sniff(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large but allowed images, odd metadata
            _check_size(data)
            if check == "full" and not (extension == "jpg" and _decodes_strictly(data)):
                with Image.open(io.BytesIO(data)) as image:
                    image.convert("RGB")
    except _DECODER_ERRORS as error:
        raise ImageError(f"{type(error).__name__}: {error}") from error
    return extension


def _check_size(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}: make it smaller")


def _decodes_strictly(data: bytes) -> bool:
    """Whether the strict decoder takes it. It is asked for a small grey picture, which reads all data but computes little."""
    try:
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, strict=True)
    except ValueError:
        return False
    return True
