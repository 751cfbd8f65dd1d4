"""iNaturalist, COCO and ADE20K in their layouts: labels, boxes, masks and maps arrive untouched; contradictions are refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.ade20k import list_ade20k
from data_tools.sources.coco import list_coco
from data_tools.sources.inat import list_inat
from simmim_scale.data.shards import NO_LABEL, ShardIndex
from tests.data_tools.layouts import fill, picture, write_ade20k, write_coco, write_inat


def test_inat_labels_follow_the_category_ids(tmp_path: Path) -> None:
    document = write_inat(tmp_path / "inat")
    source = list_inat(tmp_path / "inat")
    assert source.classes == ("0", "1")
    write_shards(source, tmp_path / "out", ShardOptions(4))
    index = ShardIndex.load(tmp_path / "out")
    ids = {image["file_name"]: image["id"] for image in document["images"]}
    for sample in range(len(index)):
        members = index.read_members(sample)
        about = json.loads(members["json"])
        assert int(members["cls"]) == ("Aves" in about["name"])
        assert about["image_id"] == ids[about["name"]]
        assert members["jpg"] == (tmp_path / "inat" / about["name"]).read_bytes()


def test_inat_names_and_unlabelled_test_images(tmp_path: Path) -> None:
    document = write_inat(tmp_path)
    names = [{"id": 2, "name": "Bellis perennis"}, {"id": 7, "name": "Turdus merula"}]
    fill(tmp_path, {"categories.json": json.dumps(names).encode()})
    assert list_inat(tmp_path, categories=tmp_path / "categories.json").classes == ("Bellis perennis", "Turdus merula")
    homonyms = [{"id": 2, "name": "Ficus", "supercategory": "Plantae"}, {"id": 7, "name": "Ficus", "supercategory": "Mollusca"}]
    fill(tmp_path, {"homonyms.json": json.dumps(homonyms).encode()})
    assert list_inat(tmp_path, categories=tmp_path / "homonyms.json").classes == ("Ficus", "Ficus")
    fill(tmp_path, {"homonyms.json": json.dumps([entry | {"supercategory": "Plantae"} for entry in homonyms]).encode()})
    with pytest.raises(ValueError, match=r"homonyms.json: category name 'Ficus \(Plantae\)' is there twice"):
        list_inat(tmp_path, categories=tmp_path / "homonyms.json")
    fill(tmp_path, {"test2018.json": json.dumps({"images": document["images"]}).encode()})
    source = list_inat(tmp_path, split="test")
    assert source.classes is None
    assert {sample.label for sample in source.samples} == {NO_LABEL}


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][0].update(file_name="../../etc/passwd"), "leaves the directory"),
        (lambda d: d["images"][0].update(file_name="train_val2018/gone.jpg"), r"gone\.jpg: named by .*train2018\.json"),
        (lambda d: d["annotations"].append({"id": 9, "image_id": 40, "category_id": 2}), "has two classes"),
        (lambda d: d["annotations"].pop(), "has no annotation"),
        (lambda d: d["annotations"][0].update(category_id=99), "category 99, which is not listed"),
        (lambda d: d["images"].append(d["images"][0]), "image id 40 is there twice"),
        (lambda d: d["images"][3].update(id=40), "image id 40 is there twice"),
        (lambda d: d["images"][3].update(id="x"), r"image id: expected a whole number, got 'x'"),
        (
            lambda d: d["annotations"].append({"id": 9, "image_id": 77, "category_id": 2}),
            "annotation 9 belongs to image 77, which is not listed",
        ),
        (lambda d: d["categories"][1].update(name="0"), "category name '0' is there twice"),
        (lambda d: d["categories"][1].update(id=2), "category id 2 is there twice"),
        (lambda d: d["categories"][1].update(name=None), "category 7 has no name"),
        (lambda d: d["annotations"].clear(), "no annotations.*--split test"),
        (lambda d: d.pop("annotations"), "no annotations.*--split test"),
        (lambda d: d.pop("images"), "list of images"),
        (lambda d: d["images"].clear(), "lists no images"),
        (lambda d: d["images"][0].pop("id"), "not the form"),
    ],
)
def test_inat_contradictions_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    document = write_inat(tmp_path)
    change(document)
    (tmp_path / "train2018.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        list_inat(tmp_path)


def test_coco_instances_arrive_as_they_were(tmp_path: Path) -> None:
    document = write_coco(tmp_path / "coco")
    source = list_coco(tmp_path / "coco")
    assert source.classes == ("person", "toothbrush")
    write_shards(source, tmp_path / "out", ShardOptions(2))
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        about = sample["json"]
        assert (about["width"], about["height"]) == sample["jpg"].size == (20, 16)
        found[about["image_id"]] = about["annotations"]
    assert {number: len(instances) for number, instances in found.items()} == {9: 1, 25: 2, 30: 0}
    for original in document["annotations"]:
        (kept,) = [a for a in found[original["image_id"]] if a["id"] == original["id"]]
        assert source.classes[kept.pop("label")] == {1: "person", 90: "toothbrush"}[original["category_id"]]
        assert kept == {name: value for name, value in original.items() if name != "image_id"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][0].update(image_id=77), "belongs to image 77"),
        (lambda d: d["annotations"][0].update(category_id=3), "category 3"),
        (lambda d: d["annotations"][0]["segmentation"].update(counts=[1, 2]), "sum 320, got 3"),
        (lambda d: d["annotations"][0]["segmentation"].update(size=[20, 16]), r"size \[16, 20\]"),
        (lambda d: d["annotations"][1].update(segmentation=[[1, 2, 3, 4, 5]]), "expected polygons"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), "expected a box"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), "expected a box"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, -3, 4]), r"sides of 0 or more, got \[1, 2, -3, 4\]"),
        (lambda d: d["annotations"][2]["segmentation"].update(counts="zzz"), "'z' is no character of one"),
        (lambda d: d["annotations"][2]["segmentation"].update(counts="a06Y"), "ends inside a number"),
        (lambda d: d["annotations"][2]["segmentation"].update(counts="a06Y8"), "sum 320, got 288"),
        (lambda d: d["annotations"][0]["segmentation"].update(counts=[10, -20, 330]), "of 0 or more, got -20"),
        (lambda d: d["annotations"][1].update(iscrowd=2), "iscrowd 0 or 1"),
        (lambda d: d["annotations"][0].update(id="x"), "annotation id: expected a whole number, got 'x'"),
        (lambda d: d["images"][0].update(id="x"), "image id: expected a whole number, got 'x'"),
        (lambda d: d["images"][0].update(height="tall"), "height of image 9: expected a whole number, got 'tall'"),
        (lambda d: d["categories"][0].update(id="x"), "category id: expected a whole number, got 'x'"),
        (lambda d: d["images"][1].update(id=9), "image id 9 is there twice"),
        (lambda d: d["categories"][1].update(id=90), "category id 90 is there twice"),
        (lambda d: d["annotations"].append(d["annotations"][0]), "there twice"),
        (lambda d: d["images"][0].update(file_name="/etc/passwd"), "leaves the directory"),
        (lambda d: d.pop("categories"), "not the form"),
    ],
)
def test_coco_contradictions_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    document = write_coco(tmp_path)
    change(document)
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        list_coco(tmp_path)


def test_coco_without_its_files_says_what_to_do(tmp_path: Path) -> None:
    fill(tmp_path, {"train2017.zip": b"PK"})
    with pytest.raises(ValueError, match=r"Unpack train2017\.zip there first"):
        list_coco(tmp_path)
    write_coco(tmp_path)
    with pytest.raises(ValueError, match=r"instances_x\.json: cannot be read"):
        list_coco(tmp_path, annotations=tmp_path / "instances_x.json")
    cut = tmp_path / "annotations/instances_train2017.json"
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no valid JSON"):
        list_coco(tmp_path)


def test_ade20k_maps_stay_untouched(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path)
    source = list_ade20k(tmp_path)
    assert len(source.classes or ()) == 150
    assert (source.classes or ())[0] == "class 1, other word"
    write_shards(source, tmp_path / "out", ShardOptions())
    index = ShardIndex.load(tmp_path / "out")
    for sample in range(2):
        members, key = index.read_members(sample), index.key(sample)
        assert members["seg.png"] == (root / f"annotations/training/{key}.png").read_bytes()
        assert members["jpg"] == (root / f"images/training/{key}.jpg").read_bytes()
        assert json.loads(members["json"])["scene"] in ("airport_terminal", "attic")
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False).decode("pil")))
    assert sample["seg.png"].size == sample["jpg"].size


def test_ade20k_maps_follow_a_smaller_image_without_new_values(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path)
    write_shards(list_ade20k(root), tmp_path / "out", ShardOptions(max_side=10))
    index = ShardIndex.load(tmp_path / "out")
    for sample in range(2):
        members = index.read_members(sample)
        image, values = Image.open(io.BytesIO(members["jpg"])), np.asarray(Image.open(io.BytesIO(members["seg.png"])))
        whole = np.asarray(Image.open(root / f"annotations/training/{index.key(sample)}.png"))
        assert image.size == (10, 8)
        assert values.shape == (8, 10)
        assert set(values.ravel()) <= set(whole.ravel())


def grey_png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (grey_png(np.full((16, 20), 151, np.uint8)), "its map seg.png has the value 151, expected 0 to 150"),
        (grey_png(np.ones((16, 20), np.uint16)), "its map seg.png has grey pixels of 16 bits, expected grey of 8 bits"),
        (picture(0, "PNG"), "its map seg.png has RGB pixels of 8 bits, expected grey of 8 bits"),
        (picture(0, "PNG", mode="P"), "its map seg.png has palette pixels of 8 bits, expected grey of 8 bits"),
        (picture(0, "PNG", mode="1"), "its map seg.png has grey pixels of 1 bits, expected grey of 8 bits"),
        (picture(0, "JPEG", mode="L"), "its map seg.png is a jpg, expected a PNG"),
    ],
    ids=["value", "16 bits", "rgb", "palette", "1 bit", "jpg"],
)
def test_ade20k_maps_of_another_form_are_listed(tmp_path: Path, content: bytes, cause: str) -> None:
    root = write_ade20k(tmp_path)
    (root / "annotations/training/ADE_train_00000001.png").write_bytes(content)
    result = write_shards(list_ade20k(root), tmp_path / "out", ShardOptions())
    assert [(item.name, cause in item.cause) for item in result.left_out] == [("ADE_train_00000001.jpg", True)]
    with pytest.raises(ValueError, match="ADE_train_00000001"):
        write_shards(list_ade20k(root), tmp_path / "refused", ShardOptions(undecodable="error"))


def test_ade20k_without_names_of_classes_or_scenes_says_so(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path)
    assert list_ade20k(root).notes == ()
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 attic\nADE_val_00000001 attic\n")
    (note,) = list_ade20k(root).notes
    assert "sceneCategories.txt: names no scene for 1 of 2 images, such as ADE_train_00000002" in note
    (root / "sceneCategories.txt").write_bytes(b"\xff garbage of many words")
    assert "no scene for 2 of 2 images" in list_ade20k(root).notes[0]
    (root / "sceneCategories.txt").unlink()
    (root / "objectInfo150.txt").unlink()
    classes, scenes = list_ade20k(root).notes
    assert "objectInfo150.txt: is not there" in classes
    assert "sceneCategories.txt: is not there" in scenes
    assert list_ade20k(root).classes is None


def test_ade20k_images_and_maps_must_belong_together(tmp_path: Path) -> None:
    root = write_ade20k(tmp_path)
    wrong = root / "annotations/training/ADE_train_00000001.png"
    wrong.write_bytes(picture(0, "PNG", size=(16, 20), mode="L"))
    result = write_shards(list_ade20k(root), tmp_path / "out", ShardOptions())
    assert "has 16x20 pixels, the image 20x16" in result.left_out[0].cause
    (root / "images/training/ADE_train_00000002.jpg").unlink()
    with pytest.raises(ValueError, match="has no image"):
        list_ade20k(root)
    wrong.unlink()
    with pytest.raises(ValueError, match="as its map of classes"):
        list_ade20k(root)
    with pytest.raises(ValueError, match="no such directory"):
        list_ade20k(tmp_path / "out")
