"""A rendered set on disk: the same bytes for any number of jobs, annotations that fit, nothing of others touched."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.synth.dataset import SynthOptions, picture_size, read_description, write_dataset
from data_tools.synth.rle import box, decode, encode, unpack

OPTIONS = SynthOptions(images=20, seed=5, side=(64, 96))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synth") / "set"
    assert write_dataset(directory, OPTIONS, jobs=1)
    return directory


def test_two_processes_write_the_same_bytes(rendered: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", OPTIONS, jobs=2)
    assert contents(tmp_path / "set") == contents(rendered)


def test_layout_is_one_folder_a_class(rendered: Path) -> None:
    description = read_description(rendered)
    assert description is not None
    folders = sorted(path.name for path in (rendered / "images").iterdir())
    assert folders == description["classes"]
    assert len(folders) == 10
    assert all(len(list((rendered / "images" / name).glob("*.jpg"))) == 2 for name in folders)


def test_annotations_agree_with_pictures_and_maps(rendered: Path) -> None:
    document = json.loads((rendered / "annotations" / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    assert len(document["images"]) == 20
    for image in document["images"]:
        with Image.open(rendered / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        semantic = np.asarray(Image.open((rendered / "masks" / image["file_name"]).with_suffix(".png")))
        objects = [item for item in document["annotations"] if item["image_id"] == image["id"]]
        assert image["file_name"].split("/")[0] in [names[item["category_id"]] for item in objects]
        for item in objects:
            mask = decode(item["segmentation"]["counts"], *item["segmentation"]["size"])
            assert mask.shape == semantic.shape
            assert mask.sum() == item["area"]
            assert box(mask) == item["bbox"]
            assert np.all(semantic[mask] == item["category_id"])


def test_the_same_set_again_is_no_work_and_another_needs_overwrite(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    assert write_dataset(directory, SynthOptions(images=2, side=(64, 64)))
    before = (directory / "dataset.json").stat().st_mtime_ns
    assert not write_dataset(directory, SynthOptions(images=2, side=(64, 64)))
    assert (directory / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="--overwrite"):
        write_dataset(directory, SynthOptions(images=1, side=(64, 64)))
    assert write_dataset(directory, SynthOptions(images=1, side=(64, 64)), overwrite=True)
    assert len(list(directory.rglob("*.jpg"))) == 1


def test_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="no rendered data set"):
        write_dataset(tmp_path, OPTIONS, overwrite=True)
    assert contents(tmp_path) == {"holiday.jpg": b"mine"}


def test_sizes_stay_in_range() -> None:
    options = SynthOptions(images=1, side=(100, 120))
    sizes = [picture_size(options, index) for index in range(200)]
    assert all(100 <= min(size) <= 120 for size in sizes)
    assert len(set(sizes)) > 50
    assert any(height > width for height, width in sizes)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"images": 0}, "--images"),
        ({"seed": -1}, "--seed"),
        ({"side": (10, 20)}, "--side"),
        ({"side": (200, 100)}, "--side"),
        ({"quality": (0, 5)}, "--quality"),
    ],
)
def test_wrong_options_name_themselves(arguments: dict, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        SynthOptions(**{"images": 1, **arguments})


@given(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_run_lengths_round_trip(height: int, width: int, random: object) -> None:
    mask = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])  # type: ignore[attr-defined]
    counts = encode(mask)
    assert sum(counts) == height * width
    assert all(count > 0 for count in counts[1:])
    np.testing.assert_array_equal(decode(counts, height, width), mask)


def test_run_lengths_as_the_format_defines_them() -> None:
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert encode(mask) == [2, 1, 1, 2]  # columns 00 | 10 | 11
    assert encode(np.ones((2, 2), bool)) == [0, 4]
    assert box(mask) == [1, 0, 2, 2]
    with pytest.raises(ValueError, match="expected a sum of 6"):
        decode([1, 2], 2, 3)


def test_compressed_run_lengths_as_pycocotools_writes_them() -> None:
    mask = np.zeros((16, 20), bool)
    mask[2:9, 3:9] = mask[4:6, 12:15] = mask[0, 18] = True
    assert unpack("b179000000000b1KcN000\\1OUO") == encode(mask)
