"""Wrong input is one clear message and exit code 2, before any training; a run directory survives it."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from simmim_scale.data.shards import ShardIndex
from tests.cli.train_many import train_many
from tests.data.conftest import encode, picture, write_shards

# case -> (settings, what the message must name)
CASES = {
    "unknown key": (["mask.ration=0.5"], ["mask.ration", "Did you mean 'ratio'"]),
    "wrong type": (["train.global_batch=many"], ["train.global_batch", "integer", "'many'"]),
    "no shards named": (["data.train=''"], ["data.train", "data_tools shard"]),
    "missing shards": (["data.train=nowhere/at/all"], ["nowhere/at/all", "data_tools shard"]),
    "empty index": (["data.train={empty}"], ["{empty}", "no samples"]),
    "truncated shard": (["data.train={truncated}"], ["part-00000.tar"]),
    "too few samples": (["train.global_batch=4096"], ["4096", "24 samples"]),
    "cell does not divide": (["mask.cell=24"], ["mask.cell", "64x64"]),
    "ratio of nothing": (["mask.ratio=0"], ["mask.ratio"]),
    "ratio of everything": (["mask.ratio=1.0"], ["mask.ratio"]),
    "unknown head": (["objective.head=linaer"], ["objective.head", "linear"]),
    "unknown implementation": (["kernels.window_attention=warp"], ["window_attention", "warp", "reference"]),
    "unknown precision": (["engine.precision=fp8"], ["engine.precision", "bf16"]),
    "weights of another architecture": (
        ["init_from={weights}", "model.embed_dim=32"],
        ["embed_dim is 16 in the weights", "32 in model"],
    ),
    "weights that are none": (["init_from={empty}"], ["weights", "{empty}"]),
    "deepspeed key that the plan owns": (["deepspeed.train_batch_size=7"], ["train_batch_size"]),
    "warm-up longer than the run": (["schedule.warmup_epochs=50"], ["warmup_epochs"]),
    "changed model on resume": (["run_dir={trained}", "model.depths=[1,1,1,1]"], ["{trained}", "model.depths"]),
    "changed schedule on resume": (["run_dir={trained}", "optimizer.base_lr=1"], ["optimizer.base_lr"]),
    "run directory of something else": (["run_dir={foreign}"], ["{foreign}", "thesis.txt"]),
    "run directory is a file": (["run_dir={foreign}/thesis.txt"], ["thesis.txt", "directory"]),
    "task of another command": (["task=classification"], ["task", "classification"]),
}


def make_empty(index: ShardIndex) -> None:
    """Turns a directory of shards into one whose index, by itself in order, lists no samples."""
    table = io.BytesIO()
    np.save(table, index.table[:0])
    (index.directory / "index.npy").write_bytes(table.getvalue())
    document = json.loads((index.directory / "index.json").read_text())
    document |= {"samples": 0, "bytes": 0, "shards": []}
    del document["sha256"]  # as older versions wrote it
    document["table"]["sha256"] = hashlib.sha256(table.getvalue()).hexdigest()
    (index.directory / "index.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("wrong")
    images = [encode(picture(sample)) for sample in range(24)]
    write_shards(root / "shards", images)
    write_shards(root / "truncated", images)
    shard = root / "truncated/part-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    make_empty(write_shards(root / "empty", images[:1]))
    (root / "foreign").mkdir()
    (root / "foreign/thesis.txt").write_text("years of work")
    names = ("shards", "empty", "truncated", "foreign", "trained", "fresh")
    return {**{name: str(root / name) for name in names}, "weights": str(root / "trained/weights")}


@pytest.fixture(scope="module")
def outcomes(places: dict[str, str], repository: Path) -> dict[str, dict]:
    config = str(repository / "configs/debug/tiny_swinv2.yaml")
    base = [config, f"data.train={places['shards']}", "data.validation=null", "train.steps=2", "schedule.warmup_epochs=0"]
    runs = {"train": [*base, f"run_dir={places['trained']}"]}
    for name, (settings, _) in CASES.items():
        runs[name] = [*base, f"run_dir={places['fresh']}", *(setting.format(**places) for setting in settings)]
    runs["resume after all of that"] = [*base, f"run_dir={places['trained']}"]
    runs["start where others failed"] = [*base, f"run_dir={places['fresh']}"]
    return train_many(runs)


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_a_clear_error(case: str, outcomes, places):
    outcome = outcomes[case]
    assert outcome["code"] == 2, outcome
    assert outcome["message"].startswith("error: ")
    assert "Traceback" not in outcome["message"]
    for word in CASES[case][1]:
        assert word.format(**places) in outcome["message"]


def test_nothing_is_lost_by_wrong_inputs(outcomes, places):
    for case in ("train", "resume after all of that", "start where others failed"):
        assert outcomes[case]["code"] == 0, outcomes[case]
    assert Path(places["foreign"], "thesis.txt").read_text() == "years of work"
    config = yaml.safe_load(Path(places["trained"], "config.yaml").read_text())
    assert config["model"]["depths"] == [1, 1, 2, 1]
    assert Path(places["trained"], "weights/model.safetensors").exists()
