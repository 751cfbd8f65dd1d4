"""Smaller images: sizes, modes, orientation, and the same bytes each time; by default nothing is touched."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.images import ImageError
from data_tools.plan import ShardOptions
from data_tools.reencode import Reencoding, reencode
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from simmim_scale.data.shards import ShardIndex
from tests.data_tools.layouts import contents, fill, picture


@pytest.mark.parametrize(
    ("reencoding", "size", "target"),
    [
        (Reencoding(), (400, 300), None),
        (Reencoding(max_side=200), (400, 300), (200, 150)),
        (Reencoding(max_side=200), (100, 200), None),
        (Reencoding(max_side=200, quality=80), (100, 200), (100, 200)),
        (Reencoding(quality=80), (400, 300), (400, 300)),
        (Reencoding(max_side=10), (1, 4000), (1, 10)),
    ],
)
def test_what_is_shrunk(reencoding: Reencoding, size: tuple[int, int], target: tuple[int, int] | None) -> None:
    assert reencoding.target(*size) == target


@pytest.mark.parametrize(
    ("kind", "mode", "result"),
    [
        ("JPEG", "RGB", "RGB"),
        ("JPEG", "L", "L"),
        ("JPEG", "CMYK", "RGB"),
        ("PNG", "P", "RGB"),
        ("PNG", "RGBA", "RGB"),
        ("PNG", "1", "L"),
    ],
)
def test_every_mode_becomes_grey_or_rgb(kind: str, mode: str, result: str) -> None:
    image = Image.open(io.BytesIO(reencode(picture(0, kind, mode=mode), (10, 8), Reencoding(max_side=10))))
    assert (image.mode, image.size, image.format) == (result, (10, 8), "JPEG")


def test_sixteen_bits_keep_their_brightness() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(buffer, "PNG")
    image = np.asarray(Image.open(io.BytesIO(reencode(buffer.getvalue(), (8, 8), Reencoding(quality=95)))))
    assert np.abs(image.astype(int) - 40000 // 256).max() <= 1


def test_the_orientation_stays_and_nothing_else() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(0))).save(buffer, "JPEG", exif=exif)
    image = Image.open(io.BytesIO(reencode(buffer.getvalue(), (10, 8), Reencoding(max_side=10))))
    assert dict(image.getexif()) == {0x0112: 6}


def test_damage_is_an_image_error() -> None:
    with pytest.raises(ImageError):
        reencode(picture(0)[:300], (10, 8), Reencoding(max_side=10))


def test_a_set_of_smaller_images(tmp_path: Path) -> None:
    files = {f"{i}.jpg": picture(i, size=(60, 40)) for i in range(5)} | {"small.png": picture(9, "PNG")}
    source = list_folder(fill(tmp_path / "src", files))
    options = ShardOptions(max_side=30, seed=1)
    write_shards(source, tmp_path / "one", options)
    write_shards(source, tmp_path / "two", options, jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    index = ShardIndex.load(tmp_path / "one")
    for sample in range(len(index)):
        members = index.read_members(sample)
        if "png" in members:
            assert members["png"] == files["small.png"]
        else:
            assert Image.open(io.BytesIO(members["jpg"])).size == (30, 20)
    assert index.options["encoder"].startswith("Pillow ")


def test_arrays_of_any_number_of_bands_stay_as_they_are(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros((90, 80, 3), np.uint8))
    source = list_folder(fill(tmp_path / "src", {"large.npy": array.getvalue(), "a.jpg": picture(1, size=(60, 40))}))
    result = write_shards(source, tmp_path / "set", ShardOptions(max_side=30))
    index = ShardIndex.load(tmp_path / "set")
    members = [index.read_members(sample) for sample in range(len(index))]
    assert [each["npy"] for each in members if "npy" in each] == [array.getvalue()]
    assert len(index) == 2
    assert not result.left_out


def test_floating_point_pixels_have_no_known_range() -> None:
    with pytest.raises(ImageError, match="no known range"):
        reencode(picture(0, "TIFF", mode="F"), (10, 8), Reencoding(max_side=10))
