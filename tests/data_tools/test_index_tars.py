"""Tars made elsewhere get an index; what cannot be read by key or place is refused."""

import errno
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_tools.index_tars import build_index
from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from data_tools.verify import load_index, verify_shards
from simmim_scale.data.shards import NO_LABEL, ShardIndex
from tests.data_tools.layouts import cut_after_members, fill, picture, tar_bytes


def by_webdataset(path: Path, samples: dict[str, dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Two tars written by webdataset itself, numbered from 3."""
    for number in (3, 4):
        samples = {f"n{number}/s{i}": {"cls": i % 3, "json": {"x": i}, "jpg": picture(10 * number + i)} for i in range(5)}
        by_webdataset(tmp_path / "tars" / f"train-{number:04d}.tar", samples)
    return tmp_path / "tars"


@pytest.mark.parametrize("jobs", [1, 2])
def test_tars_of_webdataset_get_an_index(elsewhere: Path, jobs: int) -> None:
    build_index(elsewhere, jobs=jobs)
    index = ShardIndex.load(elsewhere)
    assert (len(index), index.classes) == (10, ("0", "1", "2"))
    for sample in range(10):
        members, where = index.read_members(sample), index.locate(sample)
        number, i = 3 + sample // 5, sample % 5
        assert index.key(sample) == f"n{number}/s{i}"
        assert members["jpg"] == picture(10 * number + i)
        shard = index.shard_path(where.shard).read_bytes()
        assert shard[where.image_offset : where.image_offset + where.image_bytes] == members["jpg"]
        assert where.label == i % 3
    assert verify_shards(load_index(elsewhere)) == []


def test_our_own_tars_get_the_index_they_had(tmp_path: Path) -> None:
    source = list_folder(fill(tmp_path / "src", {f"{'cat' if i % 2 else 'dog'}/{i}.jpg": picture(i) for i in range(9)}))
    write_shards(source, tmp_path / "set", ShardOptions(4))
    before = ShardIndex.load(tmp_path / "set")
    table = np.array(before.table)
    with pytest.raises(ValueError, match=r"has an index\.json already"):
        build_index(tmp_path / "set")
    after = build_index(tmp_path / "set", overwrite=True)
    assert (after.table == table).all()
    assert (after.shards, after.classes) == (before.shards, before.classes)


def test_gnu_tars_with_long_names_and_no_labels(tmp_path: Path) -> None:
    files = {
        f"{'deep/' * 30}{i}.{ending}": data for i in range(3) for ending, data in (("png", picture(i, "PNG")), ("txt", b"t"))
    }
    fill(tmp_path, {"a.tar": tar_bytes(files), "b.tar": tar_bytes({"./x.webp": picture(9, "WEBP")}, tarfile.PAX_FORMAT)})
    index = build_index(tmp_path)
    assert index.classes is None
    assert set(index.table["label"].tolist()) == {NO_LABEL}
    assert verify_shards(load_index(tmp_path)) == []
    assert index.read_members(1) == {"png": picture(1, "PNG"), "txt": b"t"}


def test_class_names_from_a_file(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert build_index(elsewhere, classes=tmp_path / "classes.txt").classes == ("ant", "bee", "cat")
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(ValueError, match="has 1 class names, but the largest label is 2"):
        build_index(elsewhere, classes=tmp_path / "classes.txt", overwrite=True)


ONE = {"a.jpg": picture(0)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no files \*\.tar"),
        ({"a.tar": tar_bytes({"../a.jpg": picture(0)})}, "would leave the directory"),
        ({"a.tar": tar_bytes({"/a.jpg": picture(0)})}, "would leave the directory"),
        ({"a.tar": tar_bytes({"a.txt": b"x"})}, "'a' has no image, only txt.*make the tar without it"),
        ({"a.tar": tar_bytes({"README": b"x"})}, "'README' has no image, only a file without extension"),
        (
            {"a.tar": tar_bytes({"a.jpg": b"x", "b.jpg": b"y", "a.cls": b"0"})},
            "there twice, or its members do not stand together",
        ),
        ({"a.tar": tar_bytes(ONE), "b.tar": tar_bytes(ONE)}, "have the same key"),
        ({"a.tar": tar_bytes({"a.jpg": b"x", "a.cls": b"dog"})}, "the sample 'a' .* is 'dog', expected a whole number"),
        ({"a.tar/b.jpg": picture(0)}, "a.tar: is a directory, expected a tar"),
        ({"a.tar": tar_bytes(ONE)[:-9000]}, "cut off"),
        ({"a.tar": cut_after_members(tar_bytes(ONE))}, "without the empty block.*head -c 1024 /dev/zero >>"),
        ({"a.tar": b"not a tar" * 200}, "no tar header"),
    ],
)
def test_what_cannot_be_indexed_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    fill(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        build_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("pattern", ["", "*/*.tar", "/abs/*.tar", "**"])
def test_a_pattern_is_of_names_in_the_directory(elsewhere: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"--pattern: a pattern of file names.*in the directory itself"):
        build_index(elsewhere, pattern=pattern)


def test_a_link_to_nothing_is_named(elsewhere: Path) -> None:
    (elsewhere / "train-0005.tar").symlink_to("gone.tar")
    with pytest.raises(ValueError, match=r"train-0005\.tar: is a link to gone\.tar, which is not there"):
        build_index(elsewhere)


def test_a_tar_that_cannot_be_read_is_named(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("data_tools.index_tars.hash_file", refuse)
    with pytest.raises(ValueError, match=r"train-0003\.tar: cannot be read \(Permission denied\)"):
        build_index(elsewhere)


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"\xff", "no UTF-8")])
def test_class_names_that_cannot_be_read(elsewhere: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"--classes: .*classes\.txt cannot be read \({message}.*a class name a line"):
        build_index(elsewhere, classes=tmp_path / "classes.txt")


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ValueError, match="is a link"):
        build_index(tmp_path)


def test_a_gap_in_the_numbering_is_found(elsewhere: Path, tmp_path: Path) -> None:
    by_webdataset(elsewhere / "train-0007.tar", {"z": {"jpg": picture(1)}})
    build_index(elsewhere)
    (problem,) = verify_shards(load_index(elsewhere))
    assert "train-0005.tar, train-0006.tar" in problem
    assert json.loads((elsewhere / "index.json").read_text())["kind"] == "tars"
