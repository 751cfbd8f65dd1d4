"""A whole run that meets a picture which spoils the loss: it goes back to its last save, passes over the data, and finishes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BATCH, STEPS, SAVE_EVERY, PICTURES = 4, 12, 3, 26

# A target whose error is multiplied wherever the batch holds the white picture.
POISON = """
import dataclasses, os, torch
from simmim_scale.objectives import pixel_target

class Poisoned(pixel_target.Pixels):
    def sums(self, prediction, pictures, hidden):
        sums = super().sums(prediction, pictures, hidden)
        white = (pictures.stored.amin((1, 2, 3)) > 250).any()
        factor = torch.where(white, float(os.environ["POISON"]), 1.0)
        return dataclasses.replace(sums, error=sums.error * factor)

def build(context):
    target = pixel_target.build(context)
    target.__class__ = Poisoned
    return target
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Shards of grey pictures and one white one, and the module of the target."""
    root = tmp_path_factory.mktemp("poison")
    (root / "poison.py").write_text(POISON)
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = rng.integers(60, 180, (48, 48, 3)) if number else np.full((48, 48, 3), 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{number:02}.png")
    command = [
        sys.executable,
        "-m",
        "data_tools",
        "shard",
        "folder",
        str(root / "images"),
        str(root / "shards"),
        "--labels",
        "none",
    ]
    subprocess.run(command, cwd=repository, check=True)
    return root


def train(folder: Path, repository: Path, run_dir: Path, poison: str, *settings: str) -> subprocess.CompletedProcess:
    arguments = [
        *("pretrain", "configs/debug/tiny_swinv2.yaml", f"data.train={folder / 'shards'}", "data.validation=null"),
        *(
            f"run_dir={run_dir}",
            f"train.steps={STEPS}",
            f"train.global_batch={BATCH}",
            "train.micro_batch=4",
            "schedule.warmup_epochs=0",
        ),
        *("objective.target=poison:build", "objective.norm_target_window=null", "engine.zero_stage=1"),
        *(f"checkpoint.every_steps={SAVE_EVERY}", "train.max_nonfinite_steps=1", "data.crop_scale=[1, 1]", *settings),
    ]
    path = f"{folder}:{repository}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "POISON": poison}
    return subprocess.run(
        [sys.executable, "-m", "simmim_scale", *arguments],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def read(run_dir: Path) -> tuple[list[dict], list[dict]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    file = run_dir / "rollbacks.json"
    return records, json.loads(file.read_text()) if file.exists() else []


@pytest.mark.parametrize("poison", ["nan", "1000"])
def test_a_run_goes_back_and_passes_over_what_spoilt_it(folder, repository, tmp_path, poison):
    # One high loss is a spike here; none is known to be high before one is known.
    spikes = ("train.recovery.rollbacks=9", "train.recovery.spike_window=2", "train.recovery.spike_steps=1")
    result = train(folder, repository, tmp_path / "run", poison, *spikes)
    assert result.returncode == 0, result.stderr[-3000:]
    records, rollbacks = read(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1)), "the log is cut where the run went back to"
    assert not any(record.get("skipped") for record in records)
    assert max(record["loss"] for record in records) < 10
    assert rollbacks, "the white picture comes once in every epoch"
    for rollback in rollbacks:
        assert rollback["to_step"] % SAVE_EVERY == 0
        assert rollback["skipped_samples"] == (rollback["from_step"] - rollback["to_step"]) * BATCH
    counts = Counter(rollback["to_step"] for rollback in rollbacks)
    newest = max(tmp_path.glob("run/checkpoints/step_*/manifest.json"))
    position = json.loads(newest.read_text())["client_state"]["position"]
    assert position == STEPS * BATCH + sum(rollback["skipped_samples"] for rollback in rollbacks)
    assert all(0 < count < 4 for count in counts.values())
    assert "rollback 1" in (tmp_path / "run" / "environment.json").read_text()
    # A finished run stays finished, and a resume reads what was passed over.
    again = train(folder, repository, tmp_path / "run", poison, *spikes)
    assert again.returncode == 0, again.stderr[-3000:]
    assert read(tmp_path / "run")[1] == rollbacks


def test_without_permission_a_run_stops_as_before(folder, repository, tmp_path):
    result = train(folder, repository, tmp_path / "run", "nan")
    assert result.returncode == 3, result.stderr[-3000:]
    assert read(tmp_path / "run")[1] == []


def test_a_run_stops_when_its_rollbacks_are_used_up(folder, repository, tmp_path):
    # Every batch that follows is as bad: the factor holds for all pictures with this threshold.
    result = train(folder, repository, tmp_path / "run", "nan", "train.recovery.rollbacks=1", "train.steps=40")
    assert result.returncode == 3, result.stderr[-3000:]
    assert len(read(tmp_path / "run")[1]) == 1
    assert "train.recovery.rollbacks is 1" in result.stderr + result.stdout
