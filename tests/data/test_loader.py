"""The loaders as training uses them: real worker processes, several ranks, resumes."""

import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from simmim_scale.config.schema import DataConfig, MaskConfig
from simmim_scale.data.loader import build_training_loader, build_validation_loader
from simmim_scale.data.workers import Workers, warn_of_shared_memory

SAMPLES, BATCH = 22, 8


def options(workers=0, **data):
    return {
        "data": DataConfig(workers=workers, prefetch=2, **data),
        "mask": MaskConfig(cell=8),
        "image_size": (16, 16),
        "in_chans": 3,
        "seed": 11,
    }


def training(index, *, workers=0, world=1, rank=0, accumulation=1, **more):
    arithmetic = {"global_batch": BATCH, "micro_batch": BATCH // world // accumulation, "accumulation": accumulation}
    return build_training_loader(index, **options(workers), **arithmetic, rank=rank, world_size=world, **more)


def take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


def in_global_order(batches):
    """Rows of micro-batches as one dict of tensors, by position."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = whole["position"].argsort()
    return {name: entry[order] for name, entry in whole.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def index(make_shards):
    return make_shards(SAMPLES, per_shard=5)


@pytest.fixture
def one_rank(index):
    """Six steps (48 positions, more than two epochs) of one rank without workers."""
    return in_global_order(take(training(index), 6))


def test_an_epoch_uses_every_sample_once(one_rank):
    assert one_rank["position"].tolist() == list(range(6 * BATCH))
    ids = one_rank["sample"].tolist()
    assert sorted(ids[:SAMPLES]) == list(range(SAMPLES))
    assert sorted(ids[SAMPLES : 2 * SAMPLES]) == list(range(SAMPLES))


@pytest.mark.parametrize(("world", "workers", "accumulation"), [(2, 3, 1), (2, 0, 2), (1, 1, 4), (4, 0, 2)])
def test_ranks_and_workers_see_the_same_samples_in_the_same_global_order(index, one_rank, world, workers, accumulation):
    batches = []
    for rank in range(world):
        loader = training(index, workers=workers, world=world, rank=rank, accumulation=accumulation)
        batches += take(loader, 6 * accumulation)
    assert {len(batch["image"]) for batch in batches} == {BATCH // world // accumulation}
    assert_same(in_global_order(batches), one_rank)


def test_every_step_is_one_run_of_positions(index):
    loaders = [training(index, world=2, rank=rank, accumulation=2) for rank in range(2)]
    for step in range(3):
        positions = torch.cat([torch.cat([next(loader)["position"] for _ in range(2)]) for loader in loaders])
        assert sorted(positions.tolist()) == list(range(step * BATCH, (step + 1) * BATCH))
    # A rank has half of the lanes, which are the even positions, whatever the step.
    assert all(position % 2 for position in next(loaders[1])["position"].tolist())


class TestState:
    def test_position_counts_steps_that_were_handed_out_whole(self, index):
        loader = training(index, accumulation=4)
        positions = []
        for _ in range(9):
            next(loader)
            positions.append(loader.state_dict()["position"])
        assert positions == [0, 0, 0, 8, 8, 8, 8, 16, 16]

    def test_prefetched_batches_do_not_move_the_position(self, index):
        with training(index, workers=2) as loader:
            next(loader)
            time.sleep(0.2)
            assert loader.state_dict() == {"position": BATCH}

    @pytest.mark.parametrize("step", [0, 1, 3, 5])
    @pytest.mark.parametrize("world", [1, 2])
    def test_a_resume_goes_on_with_what_is_left_on_any_world_size(self, index, one_rank, step, world):
        state = {"position": step * BATCH}
        batches = []
        for rank in range(world):
            loader = training(index, world=world, rank=rank)
            loader.load_state_dict(state)
            batches += take(loader, 6 - step)
        rest = {name: entry[step * BATCH :] for name, entry in one_rank.items()}
        if step < 6:
            assert_same(in_global_order(batches), rest)

    def test_loading_a_state_discards_what_was_prefetched(self, index, one_rank):
        with training(index, workers=2) as loader:
            next(loader)
            loader.load_state_dict({"position": 3 * BATCH})
            batch = next(loader)
        assert torch.equal(batch["image"], one_rank["image"][3 * BATCH : 4 * BATCH])

    def test_any_position_is_a_start(self, index, one_rank):
        batch = take(training(index, start_position=5), 1)[0]
        assert torch.equal(batch["image"], one_rank["image"][5 : 5 + BATCH])

    def test_closing_keeps_the_position(self, index):
        loader = training(index, workers=1)
        next(loader)
        loader.close()
        assert loader.state_dict() == {"position": BATCH}
        assert next(loader)["position"].tolist() == list(range(BATCH, 2 * BATCH))
        loader.close()

    @pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": "3"}])
    def test_a_damaged_state_is_an_error(self, index, state):
        with pytest.raises(ValueError, match="position: expected a whole number"):
            training(index).load_state_dict(state)


def test_fewer_samples_than_a_global_batch_is_an_error(make_shards):
    with pytest.raises(ValueError, match=r"train\.global_batch: .*holds 7 samples, fewer than one global batch of 8.*Lower"):
        training(make_shards(7))


def test_a_global_batch_that_ranks_do_not_divide_is_an_error(index):
    with pytest.raises(ValueError, match="global_batch: expected micro_batch"):
        build_training_loader(index, **options(), global_batch=8, micro_batch=3, accumulation=1, world_size=2)


@pytest.mark.parametrize("bands", [2, 5, 8])
def test_multi_band_images_take_the_same_path(make_shards, bands):
    arrays = [np.random.default_rng(sample).integers(0, 256, (30, 40, bands), dtype=np.uint8) for sample in range(8)]
    files = []
    for array in arrays:
        files.append(io.BytesIO())
        np.save(files[-1], array)
    index = make_shards([file.getvalue() for file in files], name="bands", extension="npy")
    with build_training_loader(
        index, **(options() | {"in_chans": bands}), global_batch=8, micro_batch=8, accumulation=1
    ) as loader:
        batch = next(loader)
    assert batch["image"].shape == (8, bands, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    # Crops keep the mean, band by band.
    for image, sample in zip(batch["image"], batch["sample"].tolist(), strict=True):
        assert np.abs(image.float().mean((1, 2)).numpy() - arrays[sample].mean((0, 1))).max() < 25


def test_the_global_generator_is_left_alone(index):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(training(index), 2)
    assert torch.equal(torch.get_rng_state(), before)


class TestDamage:
    @pytest.fixture
    def damaged(self, make_shards, make_picture, make_file):
        images = [make_file(make_picture(sample)) for sample in range(SAMPLES)]
        images[3] = images[3][:60]
        images[17] = b""
        return make_shards(images, name="damaged", per_shard=5)

    def test_batches_stay_full_and_equal_on_any_world_size(self, damaged, tmp_path):
        alone = in_global_order(take(training(damaged, quarantine=tmp_path / "alone"), 6))
        batches = []
        for rank in range(2):
            loader = training(damaged, world=2, rank=rank, workers=2, quarantine=tmp_path / "two")
            batches += take(loader, 6)
        assert_same(in_global_order(batches), alone)
        ids = alone["sample"].tolist()
        assert not {3, 17} & set(ids)
        assert len(set(ids[:SAMPLES])) == SAMPLES - 2
        listed = [line for path in (tmp_path / "alone").iterdir() for line in path.read_text().splitlines()]
        assert len(listed) == 2
        assert all("damaged/part-0000" in line for line in listed)

    def test_a_set_without_images_is_a_clear_error_from_workers_too(self, make_shards):
        message = f"none of {SAMPLES} images tried in a row decodes"
        index = make_shards([b"x"] * SAMPLES, name="bad")
        with training(index, workers=1) as loader, pytest.raises(ValueError, match=message) as caught:
            next(loader)
        assert "Traceback" not in str(caught.value)

    def test_a_shard_that_vanishes_is_named(self, make_shards):
        index = make_shards(SAMPLES, name="vanishing", per_shard=SAMPLES)
        with training(index, workers=1) as loader:
            index.shard_path(0).unlink()
            with pytest.raises(FileNotFoundError, match=r"part-00000\.tar"):
                next(loader)


class TestValidation:
    def loaders(self, index, *, world=1, micro_batch=4, workers=0, samples=None):
        return [
            build_validation_loader(
                index, **options(workers), micro_batch=micro_batch, rank=rank, world_size=world, samples=samples
            )
            for rank in range(world)
        ]

    def valid_rows(self, loaders):
        whole = in_global_order([batch for loader in loaders for batch in loader])
        return {name: entry[whole["valid"]] for name, entry in whole.items()}

    @pytest.mark.parametrize(("world", "micro_batch", "workers"), [(2, 4, 0), (3, 2, 1), (1, 22, 0), (5, 7, 0)])
    def test_counts_and_views_are_the_same_on_any_world_size(self, index, world, micro_batch, workers):
        alone = self.valid_rows(self.loaders(index))
        loaders = self.loaders(index, world=world, micro_batch=micro_batch, workers=workers)
        batches = [list(loader) for loader in loaders]
        assert {len(each) for each in batches} == {len(loader) for loader in loaders}
        assert len({len(loader) for loader in loaders}) == 1
        assert {len(batch["image"]) for each in batches for batch in each} == {micro_batch}
        assert_same(self.valid_rows(loaders), alone)
        assert sorted(alone["sample"].tolist()) == list(range(SAMPLES))

    def test_two_passes_are_equal(self, index):
        (loader,) = self.loaders(index)
        assert_same(in_global_order(list(loader)), in_global_order(list(loader)))

    def test_padding_rows_are_real_images_that_do_not_count(self, index):
        (loader,) = self.loaders(index)
        last = list(loader)[-1]
        assert last["valid"].tolist() == [True, True, False, False]
        assert torch.equal(last["image"][3], last["image"][1])
        assert last["mask"][3].any()

    def test_a_subset_is_fixed_and_spread(self, index):
        few, more = (self.valid_rows(self.loaders(index, samples=count))["sample"].tolist() for count in (6, 9))
        assert len(set(few)) == 6
        assert more[:6] == few
        assert few != list(range(6))
        assert self.loaders(index, samples=1000)[0].num_samples == SAMPLES

    def test_damaged_images_do_not_count_on_any_world_size(self, make_shards, make_picture, make_file):
        images = [make_file(make_picture(sample)) for sample in range(10)]
        images[4] = b""
        index = make_shards(images, name="damaged")
        for world in (1, 3):
            rows = self.valid_rows(self.loaders(index, world=world))
            assert sorted(rows["sample"].tolist()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]

    def test_a_pass_that_is_left_early_ends_its_workers(self, index):
        (loader,) = self.loaders(index, workers=1)
        before = set(children())  # another test may have left multiprocessing's resource tracker
        passing = iter(loader)
        next(passing)
        (worker,) = set(children()) - before
        passing.close()
        assert gone(worker)


def children() -> list[int]:
    """Live child processes of this one."""
    me = os.getpid()
    listed = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    return [int(pid) for pid in listed if gone(int(pid)) is False]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_workers_outlive_the_signals_of_a_job_and_end_with_the_loader(index):
    before = set(children())
    loader = training(index, workers=2)
    next(loader)
    workers = set(children()) - before
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for pid in workers:
            os.kill(pid, number)
    batches = [next(loader) for _ in range(12)]
    assert batches[-1]["position"][0] == 12 * BATCH
    loader.close()
    assert all(gone(pid) for pid in workers)


PROGRAM = """
    import os, signal, sys
    from simmim_scale.config.schema import DataConfig, MaskConfig
    from simmim_scale.data.loader import build_training_loader
    from simmim_scale.data.shards import ShardIndex

    if __name__ == "__main__":
        loader = build_training_loader(
            ShardIndex.load(sys.argv[1]), data=DataConfig(workers=2), mask=MaskConfig(cell=8), image_size=(16, 16),
            in_chans=3, seed=0, global_batch=4, micro_batch=4, accumulation=1,
        )
        next(loader)
        print(" ".join(open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()), flush=True)
        if sys.argv[2] == "error":
            raise RuntimeError("the run fails")
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "code"), [("return", 0), ("error", 1), ("kill", -9)])
def test_no_worker_outlives_its_rank_however_it_ends(index, tmp_path, repository, end, code):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = os.environ | {"PYTHONPATH": str(repository)}
    with subprocess.Popen(
        [sys.executable, str(program), str(index.directory), end],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True,
    ) as process:  # fmt: skip
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert process.wait(timeout=240) == code
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while not all(gone(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(gone(pid) for pid in workers)


def test_too_little_shared_memory_is_announced(tmp_path, caplog):
    batch = {"image": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}
    with caplog.at_level(logging.WARNING):
        assert not warn_of_shared_memory(batch, num_batches=2, directory=str(tmp_path))
        assert not warn_of_shared_memory(batch, num_batches=2, directory=str(tmp_path / "missing"))
        assert not caplog.records
        assert warn_of_shared_memory(batch, num_batches=10**15, directory=str(tmp_path))
    assert "--shm-size" in caplog.text


def test_more_workers_than_cores_are_announced_once_and_shortly(caplog):
    assert not Workers(0).warn_of_cores()
    with caplog.at_level(logging.WARNING):
        assert Workers(10**6).warn_of_cores()
    assert "data.workers: 1000000 processes" in caplog.text
