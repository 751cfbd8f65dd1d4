"""ImageNet from its archives as they are downloaded, from what they unpack to, and what is refused."""

import io
import tarfile
from pathlib import Path

import pytest

from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.devkit import read_devkit
from data_tools.sources.imagenet import list_imagenet
from simmim_scale.data.shards import ShardIndex
from tests.data_tools.layouts import (
    SYNSETS,
    TRUTH,
    WNIDS,
    contents,
    cut_after_members,
    fill,
    imagenet_train,
    picture,
    tar_bytes,
    write_imagenet,
)

OPTIONS = ShardOptions(4, seed=1)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return write_imagenet(tmp_path / "official")


def val_names() -> list[str]:
    return [f"{SYNSETS[number][0]}/ILSVRC2012_val_{i + 1:08d}.JPEG" for i, number in enumerate(TRUTH)]


def test_the_train_archive_and_class_folders_give_the_same_shards(official: Path, tmp_path: Path) -> None:
    unpacked = fill(tmp_path / "unpacked", {f"train/{name}": data for name, data in imagenet_train().items()})
    halfway = fill(tmp_path / "halfway", {})
    with tarfile.open(official / "ILSVRC2012_img_train.tar") as tar:
        tar.extractall(halfway, filter="data")
    for number, place in enumerate((official, official / "ILSVRC2012_img_train.tar", unpacked, unpacked / "train", halfway)):
        write_shards(list_imagenet(place), tmp_path / f"out{number}", OPTIONS)
        assert contents(tmp_path / f"out{number}") == contents(tmp_path / "out0")
    index = ShardIndex.load(tmp_path / "out0")
    assert index.classes == WNIDS
    found = {}
    for sample in range(len(index)):
        members = index.read_members(sample)
        name = index.key(sample)
        image = next(members[extension] for extension in ("jpg", "png") if extension in members)
        found[f"{name}.JPEG"] = image
        assert WNIDS[int(members["cls"])] == name.split("/")[0]
    assert found == imagenet_train()


def test_validation_images_get_their_class_from_the_devkit(official: Path, tmp_path: Path) -> None:
    source = list_imagenet(official, split="val")
    assert source.classes == tuple(sorted(WNIDS))  # the inner node has no images and is no class
    assert sorted(sample.name for sample in source.samples) == sorted(val_names())
    assert all(source.classes[sample.label] == sample.name.split("/")[0] for sample in source.samples)
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": picture(200 + i) for i in range(1, 6)}
    flat = fill(tmp_path / "flat", {f"val/{name}": data for name, data in images.items()})
    folders = fill(tmp_path / "folders", {name: images[name.split("/")[1]] for name in val_names()})
    kit = official / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(kit) as tar:
        tar.extractall(tmp_path / "kit", filter="data")
    write_shards(source, tmp_path / "a", OPTIONS)
    write_shards(list_imagenet(flat, split="val", devkit=kit), tmp_path / "b", OPTIONS)
    write_shards(list_imagenet(folders, split="val"), tmp_path / "c", OPTIONS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert read_devkit(tmp_path / "kit") == read_devkit(kit)


def test_what_is_missing_is_named(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or directory"):
        list_imagenet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--split: one of train, val"):
        list_imagenet(official, split="test")
    with pytest.raises(ValueError, match=r"add --split val"):
        list_imagenet(official / "ILSVRC2012_img_val.tar")
    (official / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(ValueError, match=r"devkit, which is not beside them.*--devkit"):
        list_imagenet(official, split="val")
    with pytest.raises(ValueError, match="no images of ImageNet"):
        list_imagenet(fill(tmp_path / "empty", {"readme.txt": b"x"}))


def test_a_devkit_that_does_not_fit_is_refused(official: Path) -> None:
    (official / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes({"ILSVRC2012_val_00000001.JPEG": picture(1)}))
    with pytest.raises(ValueError, match="holds 1 images, but the ground truth has 5 lines"):
        list_imagenet(official, split="val")
    kit = official / "ILSVRC2012_devkit_t12.tar.gz"
    kit.write_bytes(kit.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read as an archive"):
        list_imagenet(official, split="val")


def test_another_number_of_class_tars_is_told(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (note,) = list_imagenet(official).notes
    assert "holds 3 class tars, ILSVRC2012 has 1,000" in note
    monkeypatch.setattr("data_tools.sources.imagenet.NUM_CLASSES", 3)
    assert list_imagenet(official).notes == ()
    assert list_imagenet(official, split="val").notes == ()


def test_archives_that_are_cut_off_are_refused(official: Path) -> None:
    train = official / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut off"):
        list_imagenet(official)
    train.write_bytes(cut_after_members(whole))
    with pytest.raises(ValueError, match=r"cut off: it ends at byte .* without the empty block"):
        list_imagenet(official)
    images = {"n01440764_1.JPEG": picture(1), "n01440764_2.JPEG": picture(2)}
    train.write_bytes(tar_bytes({"n01440764.tar": cut_after_members(tar_bytes(images))}))
    with pytest.raises(ValueError, match=r"cut off: it ends at byte .* without the empty block"):
        list_imagenet(official)
    train.write_bytes(b"\x1f\x8b" + whole[2:])
    with pytest.raises(ValueError, match=r"compressed \(gzip\)"):
        list_imagenet(official)


def hostile(name: str = "n01440764_1.JPEG", kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    data = picture(1) if kind == tarfile.REGTYPE else b""
    member.size = len(data)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(member, io.BytesIO(data))
    return tar_bytes({"n01440764.tar": buffer.getvalue()})


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (hostile("../../etc/n01440764_1.JPEG"), "would leave the directory"),
        (hostile("/etc/n01440764_1.JPEG"), "would leave the directory"),
        (hostile(kind=tarfile.SYMTYPE, target="/etc/passwd"), "is a link"),
        (hostile(kind=tarfile.LNKTYPE, target="n01440764_2.JPEG"), "is a link"),
        (hostile(kind=tarfile.FIFOTYPE), "device, pipe"),
        (hostile("passwd"), "no image by its name"),
        (
            tar_bytes({"n01440764.tar": tar_bytes({"a.JPEG": picture(1)}), "x/n01440764.tar": tar_bytes({"a.JPEG": picture(2)})}),
            "both",
        ),
    ],
)
def test_tricks_inside_archives_are_refused(tmp_path: Path, archive: bytes, message: str) -> None:
    fill(tmp_path, {"ILSVRC2012_img_train.tar": archive})
    with pytest.raises(ValueError, match=message):
        list_imagenet(tmp_path)
