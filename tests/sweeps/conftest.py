"""A sweep of four runs, in a directory of its own."""

from pathlib import Path

import pytest
import yaml

BASE = """
# command: none
task: pretrain
model: {name: swin_v2, image_size: 32, embed_dim: 16, depths: [1, 1], num_heads: [1, 2], window_size: 4}
mask: {cell: 8, ratio: 0.5}
data: {train: shards, workers: 0}
schedule: {name: cosine, warmup_epochs: 0, min_lr: 0.0}
train: {steps: 4, global_batch: 4}
engine: {precision: fp32, zero_stage: 1}
"""
SWEEP = {
    "sweep": "tried",
    "title": "Masks",
    "stages": {"pretrain": {"config": "base.yaml", "settings": {"seed": 3}, "metric": "val_loss", "title": "Loss"}},
    "axes": [
        {"name": "cell", "values": {"8 px": {"mask.cell": 8}, "16 px": {"mask.cell": 16}}},
        {"name": "ratio", "values": {".3": {"mask.ratio": 0.3}, ".5": {"mask.ratio": 0.5}}},
    ],
    "published": {"source": "nowhere", "columns": ["ImageNet"], "values": {"8 px, .5": [82.8]}},
}


@pytest.fixture
def sweep_tree() -> dict:
    import copy

    return copy.deepcopy(SWEEP)


@pytest.fixture
def write_sweep(tmp_path):
    def write(tree: dict) -> Path:
        (tmp_path / "base.yaml").write_text(BASE)
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**tree, "runs_dir": str(tmp_path / "runs")}, sort_keys=False))
        return path

    return write
