"""Damaged images end in ImageError and nothing else; good ones of every kind are taken."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools import images
from data_tools.images import ImageError, check_image, sniff

FORMATS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp", "PPM": "ppm"}


def encoded(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


ENCODED = {kind: encoded(kind) for kind in FORMATS}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_is_known_by_its_content(kind: str) -> None:
    assert sniff(ENCODED[kind]) == FORMATS[kind]
    assert check_image(ENCODED[kind]).extension == FORMATS[kind]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("PNG", "LA"), ("TIFF", "F")],
)
def test_every_mode_is_taken(kind: str, mode: str) -> None:
    if mode == "I;16":
        buffer = io.BytesIO()
        Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(buffer, kind)
        assert check_image(buffer.getvalue()).extension == "png"
    else:
        assert check_image(encoded(kind, mode)).extension == FORMATS[kind]


@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_damage_is_an_image_error_or_still_an_image(kind: str, position: int, value: int, cut: bool) -> None:
    data = bytearray(ENCODED[kind])
    position %= len(data)
    if cut:
        del data[position:]
    else:
        data[position] = value
    with contextlib.suppress(ImageError):  # any other exception fails the test
        assert check_image(bytes(data)).extension in FORMATS.values()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM"])
def test_a_cut_image_is_refused_unless_only_its_header_is_asked_for(kind: str) -> None:
    half = ENCODED[kind][: len(ENCODED[kind]) * 2 // 3]
    with pytest.raises(ImageError):
        check_image(half)
    if kind in ("JPEG", "PNG"):
        assert check_image(half, "header").extension == FORMATS[kind]


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 24 * 20 - 1)
    with pytest.raises(ImageError, match="20x24 pixels, more than 479"):
        check_image(ENCODED["PNG"], "header")


def test_a_bomb_is_refused() -> None:
    header = bytearray(ENCODED["BMP"])
    header[18:26] = (60000).to_bytes(4, "little") * 2  # width and height in the header of a file of 1.5 kB
    with pytest.raises(ImageError):
        check_image(bytes(header))


@pytest.mark.parametrize("check", ["full", "structure"])
def test_a_hole_in_the_coded_data_is_found(check: str) -> None:
    data = bytearray(encoded("JPEG"))
    start = len(data) - 300
    data[start : start + 256] = bytes(256)
    with pytest.raises(ImageError, match="premature end of data segment"):
        check_image(bytes(data), check)
    assert check_image(bytes(data), "header").extension == "jpg"


def multi_band_tiff(**options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    array = np.random.default_rng(0).integers(0, 4000, (80, 90, 5), dtype=np.uint16)
    tifffile.imwrite(buffer, array, planarconfig="contig", photometric="minisblack", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 7}, {"tile": (32, 48)}])
@pytest.mark.parametrize("check", ["full", "structure", "header"])
def test_a_multi_band_tiff_must_have_all_its_pixels(options: dict, check: str) -> None:
    data = multi_band_tiff(**options)
    facts = check_image(data, check)
    assert (facts.extension, facts.width, facts.height) == ("tif", 90, 80)
    with pytest.raises(ImageError, match=f"its pixels go on to byte {len(data)}"):
        check_image(data[: len(data) - 10], check)


def tiff_of_pages(writer: str) -> bytes:
    """A page a band, as microscopes write them; Pillow reads the first page and training reads all."""
    pages = np.random.default_rng(0).integers(0, 256, (6, 60, 100), dtype=np.uint8)
    buffer = io.BytesIO()
    if writer.startswith("tifffile"):
        options = {"compression": "zlib"} if writer.endswith("zlib") else {"metadata": None}
        pytest.importorskip("tifffile").imwrite(buffer, pages, photometric="minisblack", **options)
    else:
        first, *others = [Image.fromarray(page) for page in pages]
        first.save(buffer, "TIFF", save_all=True, append_images=others, compression=writer.partition(" ")[2] or None)
    return buffer.getvalue()


@pytest.mark.parametrize("writer", ["tifffile", "tifffile zlib", "pillow", "pillow tiff_lzw", "pillow tiff_adobe_deflate"])
@pytest.mark.parametrize("check", ["structure", "full"])
def test_every_page_of_a_tiff_must_be_there(writer: str, check: str) -> None:
    data = tiff_of_pages(writer)
    facts = check_image(data, check)
    assert (facts.extension, facts.width, facts.height) == ("tif", 100, 60)
    for kept in (0.99, 0.9, 0.5):
        with pytest.raises(ImageError):
            check_image(data[: int(len(data) * kept)], check)


def test_compressed_pixels_of_a_multi_band_tiff_are_decoded_by_the_full_check() -> None:
    data = bytearray(multi_band_tiff(compression="zlib"))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    assert check_image(bytes(data), "structure").extension == "tif"
    with pytest.raises(ImageError):
        check_image(bytes(data), "full")


def test_a_cause_is_the_same_in_every_run() -> None:
    with pytest.raises(ImageError) as caught:
        check_image(b"GIF8" + bytes(50))
    assert str(caught.value) == "the content is of no known image format"
