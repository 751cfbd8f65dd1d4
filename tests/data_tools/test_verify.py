"""Damage of any kind is found and named."""

import errno
import hashlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.checksums import hash_file
from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from data_tools.verify import load_index, verify_shards
from simmim_scale.data.shards import ShardFile, ShardIndex


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    for number in range(12):
        (root / "src" / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        (root / "src" / f"c{number % 2}" / f"{number}.jpg").write_bytes(buffer.getvalue())
    write_shards(list_folder(root / "src"), root / "shards", ShardOptions(5))
    return root / "shards"


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def problems(shards: Path) -> list[str]:
    return verify_shards(load_index(shards))


def test_a_sound_set_has_no_problems(shards: Path) -> None:
    counts: list[int] = []
    assert verify_shards(load_index(shards), progress=counts.append) == []
    assert counts == [5, 5, 2]
    assert verify_shards(load_index(shards), jobs=2) == []


def test_one_changed_byte_anywhere_is_found(shards: Path) -> None:
    path = shards / "shard-000001.tar"
    data = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(data), 40):
        changed = bytearray(data)
        changed[position] ^= 1 << int(position % 8)
        path.write_bytes(changed)
        assert any("shard-000001.tar: expected sha256" in problem for problem in problems(shards))


def test_a_shortened_missing_or_extra_shard_is_found(shards: Path) -> None:
    first, second = shards / "shard-000000.tar", shards / "shard-000001.tar"
    first.write_bytes(first.read_bytes()[:-512])
    second.rename(shards / "shard-000009.tar")
    each = problems(shards)
    assert len(each) == 3
    found = " ".join(each)
    assert "shard-000000.tar: expected" in found
    assert "shard-000001.tar: expected" in found
    assert "it is missing" in found
    assert "shard-000009.tar: not listed" in found


@pytest.mark.parametrize("kind", ["unreadable", "directory"])
def test_a_shard_that_cannot_be_read_does_not_hide_the_others(shards: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    first, last = shards / "shard-000000.tar", shards / "shard-000002.tar"
    last.write_bytes(last.read_bytes()[:-512])
    if kind == "directory":
        first.unlink()
        first.mkdir()
    else:

        def refuse(path: Path) -> str:
            if path == first:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return hash_file(path)

        monkeypatch.setattr("data_tools.verify.hash_file", refuse)
    found = problems(shards)
    assert [problem.split(":")[0] for problem in found] == [str(first), str(last)]
    assert ("Permission denied" if kind == "unreadable" else "is a directory") in found[0]


def test_a_damaged_table_is_found(shards: Path) -> None:
    data = bytearray((shards / "index.npy").read_bytes())
    data[-3] ^= 4
    (shards / "index.npy").write_bytes(data)
    assert any("index.npy" in problem for problem in problems(shards))


@pytest.mark.parametrize(
    ("column", "message"),
    [("label", "expected the label"), ("image", "where the index has the image"), ("length", "the one before ends")],
)
def test_an_index_that_disagrees_with_its_tars_is_found(shards: Path, column: str, message: str) -> None:
    index = ShardIndex.load(shards)
    table = np.array(index.table)
    table[column][2] = {"label": 1 - table["label"][2], "image": 0, "length": table["length"][2] + 512}[column]
    ShardIndex(shards, index.shards, table, index.classes).write()
    assert any(message in problem for problem in problems(shards))


def test_an_image_that_does_not_decode_is_named(shards: Path) -> None:
    index = ShardIndex.load(shards)
    where, path = index.locate(0), index.shard_path(0)
    data = bytearray(path.read_bytes())
    data[where.image_offset : where.image_offset + 20] = bytes(20)
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    files = tuple(ShardFile(f.name, f.samples, f.bytes, digest if f.name == path.name else f.sha256) for f in index.shards)
    ShardIndex(shards, files, np.array(index.table), index.classes).write()
    (problem,) = problems(shards)
    assert index.key(0) in problem
    assert "no known image format" in problem
    assert verify_shards(load_index(shards), decode=False) == []


def test_a_tiff_of_bands_that_was_cut_before_sharding_is_found(tmp_path: Path) -> None:
    first, *others = [Image.fromarray(band) for band in np.random.default_rng(0).integers(0, 256, (6, 20, 30), dtype=np.uint8)]
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=others)
    data = buffer.getvalue()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "cut.tif").write_bytes(data[: len(data) // 2])
    write_shards(list_folder(tmp_path / "src"), tmp_path / "set", ShardOptions(check="header"))
    (problem,) = problems(tmp_path / "set")
    assert "cut: ValueError: TIFF of" in problem


def test_no_index_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no index\.json"):
        load_index(tmp_path)
