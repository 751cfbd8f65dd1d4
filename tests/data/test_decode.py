"""Every kind of image file that a large collection holds, against PIL or arithmetic."""

import io
import struct
import sys

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image, ImageOps

from simmim_scale.data import decode as decode_module
from simmim_scale.data.decode import DecodeError, decode_image, jpeg_orientation


def save(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def from_pil(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert(mode))


@pytest.fixture
def pixels(make_picture):
    return make_picture(0, height=37, width=51)


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 75, "subsampling": 0}, {"progressive": True}])
def test_jpeg_pixels_are_those_of_pil(pixels, options):
    data = save(Image.fromarray(pixels), "JPEG", **options)
    image = decode_image(data)
    assert image.flags.c_contiguous
    assert np.array_equal(image, from_pil(data))


def test_a_view_into_a_map_is_decoded(pixels, make_file):
    data = make_file(pixels)
    padded = memoryview(b"x" * 100 + data + b"y" * 50)[100:-50]
    assert np.array_equal(decode_image(padded), decode_image(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("in_chans", "mode"), [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(pixels, orientation, in_chans, mode, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = Image.fromarray(pixels).convert("L").convert("RGB")  # so that luma is the same however it is computed
    data = save(grey, format, exif=exif)
    expected = from_pil(data, mode)
    assert expected.shape[:2] == ((51, 37) if orientation >= 5 else (37, 51))
    difference = decode_image(data, in_chans=in_chans).reshape(expected.shape).astype(int) - expected
    assert np.abs(difference).max() <= (1 if format == "JPEG" and in_chans == 1 else 0)


def test_orientation_comes_from_either_byte_order_and_nonsense_means_upright(pixels, make_file):
    plain = make_file(pixels)

    def with_exif(tiff: bytes) -> bytes:
        payload = b"Exif\0\0" + tiff
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + plain[2:]

    little = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)
    big = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, 8, 0, 0)
    assert jpeg_orientation(with_exif(little)) == 6
    assert jpeg_orientation(with_exif(big)) == 8
    unknown_value, beyond_the_end = little.replace(b"\x06\0\0\0", b"\x63\0\0\0"), b"II*\0\xff\xff\xff\xff"
    for nonsense in (b"", b"II", b"XX*\0\x08\0\0\0", little[:14], unknown_value, beyond_the_end):
        assert jpeg_orientation(with_exif(nonsense)) == 1
        assert np.array_equal(decode_image(with_exif(nonsense)), decode_image(plain))
    assert jpeg_orientation(plain) == 1
    assert jpeg_orientation(b"\xff\xd8\xff") == 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_colour_mode_becomes_what_the_model_takes(pixels, mode, in_chans):
    image = Image.fromarray(pixels).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    data = save(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    decoded = decode_image(data, in_chans=in_chans)
    assert decoded.shape == (37, 51, in_chans)
    assert decoded.dtype == np.uint8
    expected = from_pil(data, "L" if in_chans == 1 else "RGB").reshape(decoded.shape)
    # YCbCr JPEG: luma is taken as stored, where PIL goes through RGB. CMYK: the two round differently.
    tolerance = {"YCbCr": 12 if in_chans == 1 else 0, "CMYK": 1}.get(mode, 0)
    assert np.abs(decoded.astype(int) - expected).max() <= tolerance


def test_grey_jpeg_becomes_three_equal_channels(pixels):
    data = save(Image.fromarray(pixels).convert("L"), "JPEG")
    decoded = decode_image(data)
    assert np.array_equal(decoded, from_pil(data))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_levels_are_scaled(format):
    levels = (np.arange(40 * 50, dtype=np.uint32).reshape(40, 50) * 32).astype(np.uint16)
    data = save(Image.fromarray(levels), format)
    assert np.array_equal(decode_image(data, in_chans=1)[..., 0], (levels >> 8).astype(np.uint8))
    assert np.array_equal(decode_image(data)[..., 1], (levels >> 8).astype(np.uint8))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_the_content_decides_not_the_name(pixels, format, make_file):
    # ImageNet has a PNG that is named JPEG; nothing here looks at names.
    data = save(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(decode_image(data), from_pil(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not an image at all",
        lambda data: data[:2],
        lambda data: data[:100],
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff\xd8" + bytes(500),
        lambda data: b"<html>404</html>" + data,
    ],
    ids=["empty", "text", "two bytes", "header", "half", "zeros", "html"],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_damaged_files_are_decode_errors(pixels, damage, format):
    data = save(Image.fromarray(pixels), format)
    with pytest.raises(DecodeError) as caught:
        decode_image(damage(data))
    assert "0x" not in str(caught.value)  # addresses would make every message different


@pytest.mark.parametrize("size", [256, 512])
def test_a_hole_in_the_coded_data_is_a_decode_error_although_pil_goes_on(make_picture, make_file, size):
    data = bytearray(make_file(make_picture(0, height=96, width=128), quality=95))
    middle = len(data) * 2 // 5
    data[middle : middle + size] = bytes(size)
    assert from_pil(bytes(data)).shape == (96, 128, 3)
    with pytest.raises(DecodeError, match="premature end of data segment"):
        decode_image(bytes(data))


def test_bytes_before_the_end_marker_cost_no_pixels(pixels, make_file):
    data = make_file(pixels)
    padded = data[:-2] + b"some more text" + data[-2:]
    with pytest.raises(ValueError, match="extraneous bytes before marker 0xd9"):
        simplejpeg.decode_jpeg(padded)
    assert np.array_equal(decode_image(padded), decode_image(data))


def test_bytes_between_segments_are_left_to_pil(pixels, make_file):
    # Bytes between segments: a warning of the strict decoder.
    data = make_file(pixels)
    at = data.index(b"\xff\xdb")
    damaged = data[:at] + b"\0\0\0" + data[at:]
    try:
        expected = from_pil(damaged)
    except OSError:
        pytest.skip("this PIL refuses the file")
    assert np.array_equal(decode_image(damaged), expected)


def test_floating_point_pixels_are_refused():
    data = save(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="no known range"):
        decode_image(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_huge_images_are_refused_before_they_are_decoded(pixels, format, monkeypatch):
    data = save(Image.fromarray(pixels), format)
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 37 * 51 - 1)
    with pytest.raises(DecodeError, match="51x37 pixels are more than 1,886"):
        decode_image(data)


def test_other_channel_counts_need_an_image_that_has_them(make_file, pixels):
    with pytest.raises(DecodeError, match=r"the image has 3 channels, model\.in_chans is 4"):
        decode_image(make_file(pixels), in_chans=4)
    rgba = np.dstack([pixels, pixels[..., 0]])
    assert np.array_equal(decode_image(save(Image.fromarray(rgba), "PNG"), in_chans=4), rgba)


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


TIFF_OPTIONS = {"photometric": "minisblack", "metadata": None}
TIFFS = [
    {"planarconfig": "separate"},
    {"planarconfig": "contig"},
    {"planarconfig": "contig", "compression": "zlib", "tile": (16, 16)},
    {"planarconfig": "separate", "bigtiff": True, "byteorder": ">"},
]


@pytest.fixture
def bands():
    return np.random.default_rng(0).integers(0, 65536, (37, 51, 6), dtype=np.uint16)


class TestBands:
    @pytest.mark.parametrize("options", TIFFS, ids=["separate", "contig", "tiles", "big-endian BigTIFF"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_tiff(self, bands, options, dtype):
        array = bands if dtype == np.uint16 else (bands >> 8).astype(np.uint8)
        ordered = array.transpose(2, 0, 1) if options["planarconfig"] == "separate" else array
        assert np.array_equal(decode_image(tiff(ordered, **TIFF_OPTIONS, **options), in_chans=6), bands >> 8)

    @pytest.mark.parametrize("version", [(1, 0), (2, 0)])
    def test_npy_in_any_layout(self, bands, version):
        for array in (bands, bands.transpose(2, 0, 1), np.asfortranarray(bands), bands.astype(">u2")):
            image = decode_image(npy(array, version=version), in_chans=6)
            assert np.array_equal(image, bands >> 8)
            assert image.flags.c_contiguous
        assert np.array_equal(decode_image(npy(bands[..., 0]), in_chans=1)[..., 0], bands[..., 0] >> 8)
        assert np.array_equal(decode_image(npy(bands[..., :3]), in_chans=3), bands[..., :3] >> 8)

    def test_a_view_into_a_map(self, bands):
        data = npy(bands)
        padded = memoryview(b"x" * 7 + data + b"y" * 512)[7:-512]
        assert np.array_equal(decode_image(padded, in_chans=6), bands >> 8)

    def test_a_range_of_values(self):
        reflectance = np.array([-0.1, 0.0, 0.25, 0.5, 0.9, np.nan, np.inf], dtype=np.float32)
        image = decode_image(npy(np.repeat(reflectance[:, None, None], 5, axis=2)), in_chans=5, band_range=(0.0, 0.5))
        assert image[:, 0, 0].tolist() == [0, 0, 128, 255, 255, 0, 255]
        signed = decode_image(npy(np.array([[-100, 0, 100]], dtype=np.int16)), in_chans=1, band_range=(-100.0, 100.0))
        assert signed.ravel().tolist() == [0, 128, 255]

    def test_values_without_a_known_range_are_refused(self):
        for dtype in (np.float32, np.int16, np.int32, np.uint32):
            with pytest.raises(DecodeError, match=r"no known range; set data\.band_range"):
                decode_image(npy(np.zeros((4, 4, 5), dtype)), in_chans=5)

    def test_other_numbers_of_bands_are_refused(self, bands):
        for data in (npy(bands), tiff(bands, **TIFF_OPTIONS)):
            with pytest.raises(DecodeError, match=r"shape .*expected 5 bands"):
                decode_image(data, in_chans=5)
        with pytest.raises(DecodeError, match="expected 1 bands"):
            decode_image(npy(np.zeros((0, 4), np.uint8)), in_chans=1)

    def test_objects_and_promises_are_refused(self, bands):
        with pytest.raises(DecodeError, match="expected numbers"):
            decode_image(npy(np.array([{"a": 1}], dtype=object)), in_chans=1)
        with pytest.raises(DecodeError, match="bytes are missing"):
            decode_image(npy(bands)[:-1], in_chans=6)
        huge = npy(np.zeros((1, 1), np.uint8)).replace(b"(1, 1), }  ", b"(1000000000000, 1000000000), }")
        with pytest.raises(DecodeError):
            decode_image(huge, in_chans=1)

    def test_a_huge_tiff_is_refused_before_it_is_decoded(self, bands, monkeypatch):
        monkeypatch.setattr(decode_module, "MAX_PIXELS", 37 * 51 - 1)
        with pytest.raises(DecodeError, match="more than"):
            decode_image(tiff(bands, **TIFF_OPTIONS), in_chans=6)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("make", [npy, lambda array: tiff(array, compression="zlib", **TIFF_OPTIONS)], ids=["NPY", "TIFF"])
    def test_random_damage(self, bands, make):
        rng = np.random.default_rng(1)
        whole = make(bands[:9, :11])
        for case in range(200):
            data = bytearray(whole)
            for _ in range(rng.integers(1, 5)):
                data[rng.integers(min(len(data), 400))] = rng.integers(256)
            if case % 3 == 0:
                data = data[: rng.integers(len(data))]
            try:
                assert decode_image(bytes(data), in_chans=6).shape[2] == 6
            except DecodeError:
                continue

    def test_a_missing_package_is_named(self, bands, monkeypatch):
        monkeypatch.setitem(sys.modules, "tifffile", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'simmim-scale\[multiband\]'"):
            decode_image(tiff(bands, **TIFF_OPTIONS), in_chans=6)


@pytest.mark.filterwarnings("ignore")  # PIL comments on damage
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_random_damage_gives_an_image_or_a_decode_error_and_nothing_else(pixels, format):
    rng = np.random.default_rng(0)
    whole = save(Image.fromarray(pixels), format)
    refused = 0
    for case in range(150):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            data[rng.integers(len(data))] = rng.integers(256)
        if case % 3 == 0:
            data = data[: rng.integers(len(data))]
        try:
            image = decode_image(bytes(data))
        except DecodeError:
            refused += 1
        else:
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
    assert 0 < refused <= 150
