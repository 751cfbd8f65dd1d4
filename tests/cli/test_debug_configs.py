"""Every configuration in configs/debug trains two steps, validates, and leaves weights that load."""

import json
from pathlib import Path

import pytest

import simmim_scale
from tests.cli.train_many import train_many
from tests.data.conftest import encode, picture, write_shards

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs/debug").glob("*.yaml"))
NUM_IMAGES = 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("debug")
    shards = write_shards(root / "shards", [encode(picture(sample)) for sample in range(NUM_IMAGES)]).directory
    small = ["train.steps=2", "schedule.warmup_epochs=0", "validation.every_steps=2", "validation.samples=4"]
    data = [f"data.train={shards}", f"data.validation={shards}"]
    outcomes = train_many({path.stem: [str(path), *data, *small, f"run_dir={root / path.stem}"] for path in CONFIGS})
    assert {name: outcome["code"] for name, outcome in outcomes.items()} == {path.stem: 0 for path in CONFIGS}, outcomes
    return root


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS])
def test_trains_two_steps(name: str, runs: Path):
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["loss"] < 3 for row in rows)
    assert rows[-1]["val_loss"] > 0
    assert not simmim_scale.load(runs / name).training
