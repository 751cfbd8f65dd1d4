"""Saves that are written while training goes on: the same atomicity, one at a time, failures told at the next save or the end."""

import threading
from pathlib import Path

import pytest

from simmim_scale.config.schema import CheckpointConfig
from simmim_scale.engine.checkpoint import RunStateStore
from tests.engine.test_checkpoint import Alone, Engine, Snapshot, names


class Slow(Snapshot):
    """Writes its files when it is allowed to; says that it was copied."""

    def __init__(self, step, allowed: threading.Event, fails: bool = False):
        super().__init__(step)
        self.allowed, self.fails, self.was_copied = allowed, fails, False

    def copied(self):
        self.was_copied = True
        return self

    def write(self, path: Path) -> list[Path]:
        assert self.was_copied, "training goes on: the engine's own tensors must not be written"
        assert self.allowed.wait(30)
        if self.fails:
            raise OSError(28, "No space left on device")
        return super().write(path)


class SlowEngine(Engine):
    def __init__(self, step, allowed, fails=False):
        super().__init__(step)
        self.allowed, self.fails = allowed, fails

    def snapshot(self):
        return Slow(self.step, self.allowed, self.fails)


def store_in(path, runtime=None, **config):
    return RunStateStore(path / "checkpoints", runtime or Alone(), CheckpointConfig(asynchronous=True, **config))


def test_a_save_is_invisible_until_it_is_written_and_training_does_not_wait(tmp_path):
    store, allowed = store_in(tmp_path), threading.Event()
    store.save(Engine(1), {"position": 10})
    store.wait()
    store.save(SlowEngine(2, allowed), {"position": 20})
    assert store.newest().step == 1
    assert store.take_cost().step == 1
    assert store.take_cost() is None, "it is not written yet"
    allowed.set()
    store.wait()
    assert (store.newest().step, store.newest().client_state) == (2, {"position": 20})
    cost = store.take_cost()
    assert cost.step == 2
    assert cost.nbytes == sum(path.stat().st_size for path in store.newest().path.iterdir() if path.name != "manifest.json")
    assert 0 <= cost.still <= cost.seconds
    assert names(store) == ["latest", "step_00000001", "step_00000002"], "no marker is left, inside or beside"
    assert sorted(path.name for path in store.newest().path.iterdir()) == [
        "engine.json",
        "manifest.json",
        "rank_00000.safetensors",
    ]


def test_the_next_save_waits_for_the_one_before(tmp_path):
    store, allowed = store_in(tmp_path), threading.Event()
    store.save(SlowEngine(1, allowed), {})
    saving = threading.Thread(target=store.save, args=(Engine(2), {}))
    saving.start()
    saving.join(0.3)
    assert saving.is_alive()
    allowed.set()
    saving.join(30)
    store.wait()
    assert names(store) == ["latest", "step_00000001", "step_00000002"]


def test_a_process_that_dies_meanwhile_leaves_the_older_save(tmp_path):
    store, never = store_in(tmp_path), threading.Event()
    store.save(Engine(1), {})
    store.wait()
    store.save(SlowEngine(2, never), {})  # and the process ends here: its threads are daemons
    after = store_in(tmp_path)
    assert after.newest().step == 1
    after.save(Engine(3), {})
    after.wait()
    assert names(after) == ["latest", "step_00000001", "step_00000003"], "what was half written is removed"
    never.set()


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_nobody_waits_for_ever(tmp_path):
    class TwoRanks(Alone):
        world_size = 2

        def gather_objects(self, value):
            return [value, "rank_00001.safetensors: No space left on device"]

    store, allowed = store_in(tmp_path, TwoRanks()), threading.Event()
    allowed.set()
    store.save(SlowEngine(1, allowed), {})
    with pytest.raises(OSError, match=r"rank_00001.*No space left on device.*older saves are untouched"):
        store.wait()
    assert names(store) == []


def test_a_full_disk_is_told_at_the_next_save_and_the_run_could_go_on(tmp_path):
    store, allowed = store_in(tmp_path), threading.Event()
    allowed.set()
    store.save(Engine(1), {})
    store.save(SlowEngine(2, allowed, fails=True), {})
    with pytest.raises(OSError, match=r"No space left on device.*older saves are untouched"):
        store.save(Engine(3), {})
    assert names(store) == ["latest", "step_00000001"]
    store.save(Engine(4), {})
    store.wait()
    assert store.newest().step == 4
