"""`simmim bench step`: a whole small run in a process of its own, and the rules that put operators into categories."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import record_function

from simmim_scale.bench.step import floor_seconds
from simmim_scale.bench.step_profile import CATEGORIES, profile_step
from simmim_scale.bench.step_report import ratios

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.image_size=32",
    "model.depths=[1,1]",
    "model.num_heads=[1,2]",
    "model.drop_path=0",
    "mask.cell=8",
    "train.micro_batch=null",
]


def bench(*arguments, expected=0):
    command = [sys.executable, "-m", "simmim_scale", "bench", "step", "configs/debug/tiny_swinv2.yaml", *SMALL, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "140"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == expected, result.stdout + result.stderr
    return result


def test_both_sides_are_measured_on_the_same_loss(tmp_path):
    output = bench("--against", "reference", "--batch", "4", "--turns", "2", "--warmup", "2", "--out", str(tmp_path)).stdout
    result = json.loads((tmp_path / "step.json").read_text())
    ours, reference = result["rows"]
    assert (ours["side"], reference["side"]) == ("simmim_scale", "reference")
    assert ours["first_loss"] == pytest.approx(reference["first_loss"], rel=1e-5)
    for row in result["rows"]:
        assert len(row["all_seconds"]) == 2
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert set(row["seconds_by_category"]) == set(CATEGORIES)
        assert sum(row["seconds_by_category"].values()) == pytest.approx(row["seconds"])
        for category in ("matrix products", "attention", "norms and pointwise", "loss", "optimizer"):
            assert row["seconds_by_category"][category] > 0, (row["side"], category)
        assert 2**20 < row["peak_bytes"] < 2**32
        assert 0 < row["share_of_floor"] < 1
    assert reference["seconds_by_category"]["communication"] == 0
    # Twice the multiply-adds, three times: backward costs twice the forward.
    assert result["facts"]["flops_per_image"] == 6 * result["facts"]["multiply_adds"]
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert f"{ratios(result)['images_per_second']:.2f} times" in output
    assert "matrix products" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "timm"], "--against: only 'reference' is known, got 'timm'"),
        (["--against", "reference", "model.drop_path=0.2"], "compares without drop path, got model.drop_path 0.2"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    result = bench("--batch", "1", *arguments, expected=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_time_goes_where_the_forward_was():
    x = torch.randn(64, 64, requires_grad=True)
    weight = torch.randn(64, 64, requires_grad=True)

    def step():
        with record_function("attention"):
            logits = (x @ weight) + 1.0  # a product is a product, wherever it is
            y = torch.softmax(logits, -1)
        y = F.gelu(y)
        with record_function("loss"):
            loss = (y - 1.0).abs().sum()
        loss.backward()
        with record_function("optimizer"), torch.no_grad():
            weight.sub_(weight.grad)

    found = profile_step(step, torch.device("cpu"))
    assert set(found) == set(CATEGORIES)
    assert found["communication"] == 0
    for category in ("matrix products", "attention", "norms and pointwise", "loss", "optimizer", "idle"):
        assert found[category] > 0, category

    def attention_alone():
        with record_function("attention"):
            torch.softmax(x + 1.0, -1).backward(torch.ones(64, 64))

    found = profile_step(attention_alone, torch.device("cpu"))
    assert found["attention"] > 0
    assert found["matrix products"] == found["loss"] == found["optimizer"] == 0


def test_the_floor_adds_products_and_the_update():
    facts = {"flops_per_image": 6e9, "batch": 10, "update_bytes": 4e9}
    assert floor_seconds(facts, copy=1e9, product=60e9) == pytest.approx(1.0 + 4.0)
