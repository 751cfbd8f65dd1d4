"""Images of any number of bands: NPY arrays, and TIFF files that Pillow does not know. Only their headers are looked at."""

import ast
import io
import math
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

_MOST_HEADER = 2**16  # bytes
# Tags of a TIFF directory; strips and tiles: where they start, how many bytes they have.
_WIDTH, _HEIGHT = 256, 257
_STRIPS, _TILES = (273, 279), (324, 325)
_TIFF_TAGS = {_WIDTH, _HEIGHT, *_STRIPS, *_TILES}


def is_array(data: bytes, extension: str) -> bool:
    """Whether an image is one of those: an NPY, or a TIFF that Pillow cannot open."""
    if extension != "tif":
        return extension == "npy"
    try:
        with Image.open(io.BytesIO(data)):
            return False
    except UnidentifiedImageError:
        return True


def array_shape(data: bytes, extension: str) -> tuple[int, ...]:
    """(height, width, bands) or (height, width).

    Raises:
        ValueError: Damaged, cut off, or no image; TypeError, LookupError, struct.error: damaged as well.
    """
    return _npy_shape(data) if extension == "npy" else _tiff_shape(data)


def _npy_shape(data: bytes) -> tuple[int, ...]:
    """Shape of an NPY (numpy.lib.format), whose data must be all there."""
    version = tuple(data[6:8])
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"NPY of version {version}, expected 1.0 or 2.0")
    start = 10 if version == (1, 0) else 12
    length = int.from_bytes(data[8:start], "little")
    if length > _MOST_HEADER or start + length > len(data):
        raise ValueError("NPY with a damaged header")
    header = ast.literal_eval(data[start : start + length].decode("latin-1").strip())
    shape, dtype = header["shape"], np.dtype(header["descr"])
    if dtype.hasobject or len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"NPY of {dtype} with shape {shape}, expected numbers with (height, width) or (height, width, bands)")
    if start + length + math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"NPY of {len(data)} bytes, which are not those of {shape} {dtype}")
    return shape


def _tiff_shape(data: bytes) -> tuple[int, ...]:
    """(height, width) from the first directory of a TIFF (TIFF 6.0, section 2), whose pixels must be all there."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    found: dict[int, tuple[int, ...]] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, values = struct.unpack_from(order + "HHI", data, entry)
        if tag in _TIFF_TAGS and kind in (3, 4):  # numbers of 16 or 32 bits
            code, size = ("H", 2) if kind == 3 else ("I", 4)
            # Where they do not fit into the entry, it says where they are.
            start = entry + 8 if values * size <= 4 else struct.unpack_from(order + "I", data, entry + 8)[0]
            found[tag] = struct.unpack_from(f"{order}{values}{code}", data, start)
    width, height = (next(iter(found.get(tag, ())), 0) for tag in (_WIDTH, _HEIGHT))
    if not (width and height):
        raise ValueError("TIFF without a size")
    for offsets, lengths in (_STRIPS, _TILES):
        ends = [offset + length for offset, length in zip(found.get(offsets, ()), found.get(lengths, ()), strict=True)]
        if ends and max(ends) > len(data):
            raise ValueError(f"TIFF of {len(data)} bytes, but its pixels go on to byte {max(ends)}")
    return height, width


def check_pages(data: bytes) -> None:
    """Follows a TIFF from directory to directory: readers take a file that was cut between pages for one with fewer.

    Raises:
        ValueError: A directory is not all there.
    """
    order = "<" if data[:2] == b"II" else ">"
    at, seen = struct.unpack_from(order + "I", data, 4)[0], set[int]()
    while at and at not in seen:
        seen.add(at)
        end = at + 2
        if end <= len(data):
            end += 12 * struct.unpack_from(order + "H", data, at)[0]
        if end > len(data):
            raise ValueError(f"TIFF of {len(data)} bytes, but the directory of its page {len(seen)} goes on to byte {end}")
        at = struct.unpack_from(order + "I", data, end)[0] if end + 4 <= len(data) else 0
