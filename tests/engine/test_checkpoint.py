"""The store of run states: complete or invisible; truncated and foreign files are neither used nor deleted."""

import json
from pathlib import Path

import pytest

from simmim_scale.config.schema import CheckpointConfig
from simmim_scale.engine import checkpoint
from simmim_scale.engine.checkpoint import RunStateStore


class Alone:
    """The runtime of a single rank, without a process group."""

    is_main = True
    rank, world_size = 0, 1

    def broadcast_object(self, value):
        return value

    def gather_objects(self, value):
        return [value]


class Engine:
    """Its snapshots are two small text files."""

    def __init__(self, step=0):
        self.step = step

    def snapshot(self):
        return Snapshot(self.step)


class Snapshot:
    def __init__(self, step):
        self.step = step

    def copied(self):
        return self

    def write(self, path: Path) -> list[Path]:
        files = [path / "rank_00000.safetensors", path / "engine.json"]
        for file in files:
            file.write_text(f"state of step {self.step}")
        return files


def store_in(path, **config):
    return RunStateStore(path / "checkpoints", Alone(), CheckpointConfig(**config))


def save(store, *steps):
    for step in steps:
        store.save(Engine(step), {"position": step * 10})


def names(store):
    return sorted(path.name for path in store.directory.iterdir())


def test_what_is_saved_is_found(tmp_path):
    store = store_in(tmp_path)
    assert store.newest() is None
    save(store, 3, 12)
    newest = store.newest()
    assert (newest.step, newest.client_state, newest.path.name) == (12, {"position": 120}, "step_00000012")
    assert (newest.path / "engine.json").read_text() == "state of step 12"
    assert (store.directory / "latest").read_text() == "step_00000012\n"


def test_steps_are_compared_as_numbers_not_by_time_or_name(tmp_path):
    store = store_in(tmp_path, keep=9)
    save(store, 100_000_000, 99_999_999)
    assert store.newest().step == 100_000_000


def test_the_newest_ones_stay(tmp_path):
    store = store_in(tmp_path, keep=2)
    save(store, 1, 2, 3, 4)
    assert names(store) == ["latest", "step_00000003", "step_00000004"]


def test_multiples_stay_for_good(tmp_path):
    store = store_in(tmp_path, keep=1, keep_every_steps=2)
    save(store, 1, 2, 3, 4, 5)
    assert names(store) == ["latest", "step_00000002", "step_00000004", "step_00000005"]


def truncate(path):
    (path / "rank_00000.safetensors").write_text("state")


def lose_a_file(path):
    (path / "engine.json").unlink()


def cut_the_manifest(path):
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])


def lose_the_manifest(path):
    (path / "manifest.json").unlink()


def other_format(path):
    (path / "manifest.json").write_text(json.dumps({"format": "other", "version": 1, "step": 9, "files": {}, "client_state": {}}))


def not_even_a_mapping(path):
    (path / "manifest.json").write_text("[1, 2]")


@pytest.mark.parametrize("damage", [truncate, lose_a_file, cut_the_manifest, lose_the_manifest, other_format, not_even_a_mapping])
def test_a_damaged_save_is_passed_over_and_never_deleted(tmp_path, damage, caplog):
    store = store_in(tmp_path, keep=1)
    save(store, 1)
    first = store.newest().path
    kept = store_in(tmp_path, keep=5)
    save(kept, 2)
    damage(store.directory / "step_00000002")
    assert store.newest().path == first
    assert "step_00000002 is not a complete save" in caplog.text
    save(store, 3, 4)
    assert names(store) == ["latest", "step_00000002", "step_00000004"], "only complete saves of ours go"


def test_a_damaged_save_in_the_way_is_left_alone(tmp_path):
    store = store_in(tmp_path)
    save(store, 5)
    truncate(store.directory / "step_00000005")
    save(store, 5)
    assert names(store) == ["latest", "step_00000005", "step_00000005.1"]
    assert store.newest().path.name == "step_00000005.1"


def test_foreign_files_stay_where_they_are(tmp_path):
    store = store_in(tmp_path, keep=1)
    foreign = [
        store.directory / "notes.txt",
        store.directory / "step_backup" / "x.pt",
        store.directory / ".unfinished-mine" / "y",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    save(store, 1)
    (store.directory / "step_00000001" / "notes.txt").write_text("mine too")
    save(store, 2, 3)
    assert all(path.read_text() == "mine" for path in foreign)
    assert (store.directory / "step_00000001" / "notes.txt").exists(), "a save with something else in it is kept"
    assert not (store.directory / "step_00000002").exists()


@pytest.mark.parametrize("moment", ["_sync", "_sizes", "_write_synced"])
def test_dying_at_any_moment_of_a_save_leaves_the_older_one(tmp_path, monkeypatch, moment):
    store = store_in(tmp_path)
    save(store, 1)
    alive = getattr(checkpoint, moment)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(checkpoint, moment, die)
    with pytest.raises(Killed):
        save(store, 2)
    monkeypatch.setattr(checkpoint, moment, alive)
    assert store.newest().step == 1
    save(store, 3)
    assert names(store) == ["latest", "step_00000001", "step_00000003"], "what the kill left is cleaned up"


def test_dying_after_the_renaming_leaves_the_new_one(tmp_path, monkeypatch):
    store = store_in(tmp_path, keep=1)
    save(store, 1)
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert store.newest().step == 2
    save(store, 3)
    assert names(store) == ["latest", "step_00000003"]


def test_a_full_disk_raises_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    save(store, 1)
    write = checkpoint._write_synced

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(OSError, match=r"No space left on device.*older saves are untouched"):
        save(store, 2)
    monkeypatch.setattr(checkpoint, "_write_synced", write)
    assert names(store) == ["latest", "step_00000001"]
    assert store.newest().step == 1
