"""Images with any number of bands, as satellites and microscopes make them: NPY arrays and TIFF files, to uint8 (h, w, c).

Arrays may be (h, w), (h, w, bands) or (bands, h, w). uint8 is taken as it is and uint16 divided by 256; anything else needs the
range of values that becomes 0 to 255 (`data.band_range`), which also serves 16-bit data that use a part of their range.
"""

import io

import numpy as np
from jaxtyping import UInt8

NPY_START = b"\x93NUMPY"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
PLAIN_DTYPES = {"u1", "u2"}


def is_npy(data: bytes | memoryview) -> bool:
    return bytes(data[: len(NPY_START)]) == NPY_START


def is_tiff(data: bytes | memoryview) -> bool:
    return bytes(data[:4]) in TIFF_STARTS


def read_npy(data: bytes | memoryview) -> np.ndarray:
    """The array of an NPY file, as a view of its bytes. Raises ValueError for damage, objects and missing data."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"NPY version {version} is not supported, only 1.0 and 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject or dtype.kind not in "uif":
        raise ValueError(f"an array of {dtype}, expected numbers")
    count = int(np.prod([int(side) for side in shape], dtype=object)) if shape else 1
    missing = count * dtype.itemsize - (len(data) - file.tell())
    if missing > 0:
        raise ValueError(f"{missing:,} bytes are missing")
    flat = np.frombuffer(data, dtype=dtype, count=count, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def read_tiff(data: bytes | memoryview, *, max_values: int) -> np.ndarray:
    """The first picture of a TIFF file with all its bands.

    Raises:
        ValueError: More values than `max_values`.
        ModuleNotFoundError: tifffile is not installed.
        Exception: Whatever tifffile raises on damage.
    """
    try:
        from tifffile import TiffFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: TIFF files with other than 1 or 3 bands need: pip install 'simmim-scale[multiband]'."
        ) from error
    with TiffFile(io.BytesIO(data)) as tiff:
        series = tiff.series[0]
        if series.size > max_values:
            raise ValueError(f"{series.size:,} values are more than {max_values:,}")
        return series.asarray()


def to_pixels(array: np.ndarray, *, in_chans: int, band_range: tuple[float, float] | None) -> UInt8[np.ndarray, "h w c"]:
    """Puts bands last and values into bytes. Raises ValueError where bands or values do not fit."""
    bands_last = _bands_last(array, in_chans)
    if band_range is None:
        if bands_last.dtype.str[1:] not in PLAIN_DTYPES:
            raise ValueError(f"values of type {bands_last.dtype} have no known range; set data.band_range")
        return np.ascontiguousarray(bands_last if bands_last.dtype.itemsize == 1 else (bands_last >> 8).astype(np.uint8))
    low, high = band_range
    scaled = (bands_last.astype(np.float32) - low) * (255 / (high - low))
    # Missing values (NaN) become the lowest one.
    return np.ascontiguousarray(np.nan_to_num(scaled.clip(0, 255)).round().astype(np.uint8))


def _bands_last(array: np.ndarray, in_chans: int) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] != in_chans and array.shape[0] == in_chans:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != in_chans or not array.size:
        raise ValueError(f"an array of shape {array.shape}, expected {in_chans} bands (model.in_chans)")
    return array
