"""Whole fine-tuning runs of `python -m launch`: 2 ranks, ZeRO-3, augmentation and mixing, killed inside an epoch and resumed."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from simmim_scale.models.weights import load_weights
from tests.data.conftest import encode, picture, write_shards
from tests.multiprocess.test_training_runs import finish, kill_processes, records, steps_done, wait_for

STEPS, SAVE_EVERY, NUM_IMAGES = 9, 2, 44  # 5.5 steps an epoch: saves and kills fall inside epochs
SETTINGS = (
    "model.image_size=32",
    "model.embed_dim=16",
    "model.depths=[1,1,2]",
    "model.num_heads=[1,2,4]",
    "model.window_size=4",
    f"train.steps={STEPS}",
    "train.epochs=null",
    "train.global_batch=8",
    "train.micro_batch=2",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "validation.every_steps=4",
    "classification.mix_group=4",
    "engine.zero_stage=3",
    "data.workers=1",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(run_dir) -> the launcher's process; whatever is left at the end is killed."""
    images, labels = [encode(picture(sample)) for sample in range(NUM_IMAGES)], [sample % 6 for sample in range(NUM_IMAGES)]
    shards = write_shards(tmp_path_factory.mktemp("shards") / "set", images, labels=labels).directory
    started: list[Path] = []

    def run(run_dir: Path) -> subprocess.Popen[str]:
        started.append(run_dir)
        config = repository / "configs/debug/finetune.yaml"
        data = (f"data.train={shards}", f"data.validation={shards}", f"run_dir={run_dir}")
        command = [sys.executable, "-m", "launch", "--ranks", "2", "--", "finetune", str(config), *data, *SETTINGS]
        return subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    yield run
    for run_dir in started:
        kill_processes(run_dir)


def figures(run_dir: Path) -> list[tuple]:
    """What must be the same: everything that is not a time or a size of memory."""
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "val_loss", "val_top1", "val_top5")
    return [tuple(record.get(key) for key in keys) for record in records(run_dir)]


def test_killed_inside_an_epoch_and_resumed_gives_the_same_losses_and_averaged_weights(start, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    output, code = finish(start(whole))
    assert code == 0, output
    rows = figures(whole)
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert [row[0] for row in rows if row[-2] is not None] == [4, 8, 9]

    rng = random.Random(seed := random.SystemRandom().randrange(2**32))
    process = start(broken)
    step = rng.randrange(SAVE_EVERY + 1, STEPS)
    wait_for(lambda: steps_done(broken) >= step, process)
    time.sleep(rng.uniform(0, 0.2))
    kill_processes(broken)
    finish(process)
    output, code = finish(start(broken))
    assert code == 0, f"seed {seed}: {output}"
    assert figures(broken) == rows, f"seed {seed}"
    for name in ("weights", "weights_ema"):
        first, second = load_weights(whole / name).state, load_weights(broken / name).state
        assert all(torch.equal(value, second[key]) for key, value in first.items()), (name, seed)
