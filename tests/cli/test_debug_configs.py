"""Every configuration in configs/debug, and a network of one's own, trains two steps, validates, and leaves weights that load."""

import json
from pathlib import Path

import pytest

import simmim_scale
from simmim_scale.models.weights import load_weights
from tests.cli.train_many import train_many
from tests.data.conftest import encode, picture, write_shards

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs/debug").glob("*.yaml"))
NUM_IMAGES = 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("debug")
    images, labels = [encode(picture(sample)) for sample in range(NUM_IMAGES)], [sample % 6 for sample in range(NUM_IMAGES)]
    shards = write_shards(root / "shards", images, labels=labels).directory
    small = ["train.steps=2", "schedule.warmup_epochs=0", "validation.every_steps=2", "validation.samples=4"]
    data = [f"data.train={shards}", f"data.validation={shards}"]
    wanted = {path.stem: [str(path), *data, *small, f"run_dir={root / path.stem}"] for path in CONFIGS}
    wanted["tiny_swinv2"] += [f"probe.fit={shards}", f"probe.test={shards}", "probe.fit_samples=30", "probe.neighbours=1"]
    wanted["finetune"].append(f"init_from={root / 'demo'}")  # trained before it, in the order of names
    own = ["model.name=tests.cli.own_network:backbone", "model.stride=16", "objective.head=tests.cli.own_network:head"]
    own.append("mask.sampler=tests.cli.own_network:around")
    wanted["own"] = [*wanted["tiny_swinv2"], *own, "engine.activation_checkpointing=none", f"run_dir={root / 'own'}"]
    outcomes = train_many(wanted)
    assert {name: outcome["code"] for name, outcome in outcomes.items()} == dict.fromkeys(wanted, 0), outcomes
    return root


@pytest.mark.parametrize("name", [*(path.stem for path in CONFIGS), "own"])
def test_trains_two_steps(name: str, runs: Path):
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["loss"] < 3 for row in rows)
    assert rows[-1]["val_loss"] > 0
    assert not simmim_scale.load(runs / name).training


def test_fine_tuning_starts_from_the_backbone_of_pretraining_and_leaves_averaged_weights(runs: Path):
    before, after = (load_weights(runs / name / "weights").state for name in ("demo", "finetune"))
    averaged = load_weights(runs / "finetune/weights_ema").state
    name = "backbone.layers.0.blocks.0.mlp.fc1.weight"
    moved = (after[name] - before[name]).abs().max()
    assert 0 < moved < 2e-3 * 2  # two steps at a rate far below 1e-3; a new draw would differ by .1
    assert after["head.weight"].shape == (6, 192)
    assert "mask_token.token" not in after
    assert not averaged[name].equal(after[name])
    rows = [json.loads(line) for line in (runs / "finetune/metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[-1]["val_top1"] <= rows[-1]["val_top5"] <= 100


def test_probes_run_during_pretraining_under_zero_3(runs: Path):
    rows = [json.loads(line) for line in (runs / "tiny_swinv2/metrics.jsonl").read_text().splitlines()]
    assert "val_knn" not in rows[0]
    # The fit's 30 images are among the tested 40, and the nearest neighbour of an image is the image itself.
    assert rows[-1]["val_knn"] >= 75
    assert 0 <= rows[-1]["val_linear"] <= 100
