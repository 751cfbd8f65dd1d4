"""What can be rebuilt from the set itself comes back byte for byte; what cannot is left alone and still told."""

import json
import shutil
from pathlib import Path

import pytest

from data_tools.plan import ShardOptions
from data_tools.repair import repair_set
from data_tools.sharding import write_shards
from data_tools.sources.folder import list_folder
from data_tools.verify import load_index, verify_shards
from simmim_scale.data.shards import DamageError, ShardIndex
from tests.data_tools.layouts import contents, fill, picture


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repair")
    files = {f"{'cat' if i % 3 else 'dog'}/{i}.jpg": picture(i) for i in range(14)}
    write_shards(list_folder(fill(root / "src", files)), root / "set", ShardOptions(5))
    return root / "set"


@pytest.fixture
def shards(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


def test_nothing_to_repair(shards: Path) -> None:
    assert repair_set(shards) == []


@pytest.mark.parametrize("damage", ["missing", "changed", "cut"])
def test_the_table_is_rebuilt(shards: Path, whole: Path, damage: str) -> None:
    table = shards / "index.npy"
    data = bytearray(table.read_bytes())
    data[-5] ^= 1
    table.unlink()
    if damage != "missing":
        table.write_bytes(data if damage == "changed" else data[:-30])
    (sentence,) = repair_set(shards)
    assert "index.npy: made again from the tars" in sentence
    assert contents(shards) == contents(whole)


@pytest.mark.parametrize("content", [None, b"{", b'{"format": "other"}'])
def test_a_lost_index_is_made_anew(shards: Path, whole: Path, content: bytes | None) -> None:
    (shards / "index.json").unlink()
    if content is not None:
        (shards / "index.json").write_bytes(content)
    (sentence,) = repair_set(shards)
    assert "source and options of the lost one are not known" in sentence
    index, before = ShardIndex.load(shards), ShardIndex.load(whole)
    assert (index.table == before.table).all()
    assert (index.shards, index.classes) == (before.shards, before.classes)
    assert verify_shards(load_index(shards)) == []


def test_an_unfinished_set_gets_no_index(shards: Path) -> None:
    (shards / "index.json").unlink()
    (shards / ".shards").mkdir()
    with pytest.raises(ValueError, match="sharding was interrupted"):
        repair_set(shards)
    assert not (shards / "index.json").exists()


@pytest.mark.parametrize("damage", ["cut", "overwritten", "longer"])
def test_the_end_of_a_tar_is_restored(shards: Path, whole: Path, damage: str) -> None:
    path = shards / "shard-000001.tar"
    data = path.read_bytes()
    changed = {"cut": data[:-1500], "overwritten": data[:-700] + b"x" * 700, "longer": data + bytes(512)}[damage]
    path.write_bytes(changed)
    (sentence,) = repair_set(shards)
    assert "its end was cut off or overwritten" in sentence
    assert contents(shards) == contents(whole)


def test_a_damaged_sample_is_left_alone_and_told(shards: Path) -> None:
    path = shards / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[900] ^= 1
    path.write_bytes(data)
    assert repair_set(shards) == []
    assert path.read_bytes() == data
    assert any("expected sha256" in problem for problem in verify_shards(load_index(shards)))
    (shards / "index.npy").unlink()
    with pytest.raises(DamageError, match=r"shard-000001\.tar is not the tar that index\.json lists"):
        repair_set(shards)  # a table of damaged tars would hide the damage
    assert not (shards / "index.npy").exists()


def test_a_removed_shard_is_a_gap(shards: Path) -> None:
    (shards / "shard-000001.tar").unlink()
    document = json.loads((shards / "index.json").read_text())
    assert any("it is missing" in problem for problem in verify_shards(load_index(shards)))
    index = ShardIndex.load(shards, check=False)
    keep = [0, 2]
    rows = [row for shard in keep for row in range(int(index.starts[shard]), int(index.starts[shard + 1]))]
    ShardIndex(
        shards,
        tuple(index.shards[shard] for shard in keep),
        index.table[rows],
        index.classes,
        "folder",
        options=document["options"],
    ).write()
    (problem,) = verify_shards(load_index(shards))
    assert "gap: the index lists no shard-000001.tar" in problem


def test_a_slice_without_images_is_no_gap(tmp_path: Path) -> None:
    files = {f"{i}.jpg": b"bad" if 3 <= i < 6 else picture(i) for i in range(9)}
    write_shards(list_folder(fill(tmp_path / "src", files)), tmp_path / "set", ShardOptions(3, shuffle=False))
    index = load_index(tmp_path / "set")
    assert index.gaps == (1,)
    assert verify_shards(index) == []
