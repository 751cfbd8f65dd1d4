"""A record becomes one flat JSON object, whatever was measured."""

import json
import math

import pytest

from simmim_scale.reports.records import GIB, OpRow, RunHeader, StepRecord


def test_record_becomes_one_flat_object() -> None:
    record = StepRecord(
        step=7, epoch=0.5, loss=0.25, lr=1e-3, grad_norm=2.0, images_per_second=100.0, data_wait=0.1, memory_bytes=3 * GIB,
        validation={"val_loss": 0.5},
    )  # fmt: skip
    assert record.as_json() == {
        "step": 7, "epoch": 0.5, "loss": 0.25, "lr": 1e-3, "grad_norm": 2.0, "images_per_second": 100.0, "data_wait": 0.1,
        "memory_gib": 3.0, "val_loss": 0.5,
    }  # fmt: skip


def test_what_is_not_finite_is_null_and_stays_valid_json() -> None:
    record = StepRecord(
        step=1, epoch=0.0, loss=math.nan, lr=0.0, grad_norm=math.inf, skipped=True, validation={"val_loss": math.nan}
    )
    written = json.loads(json.dumps(record.as_json(), allow_nan=False))
    assert written["loss"] is None
    assert written["grad_norm"] is None
    assert written["val_loss"] is None
    assert written["skipped"] is True


def test_loss_keeps_every_digit() -> None:
    loss = 0.1 + 0.2
    assert json.loads(json.dumps(StepRecord(step=1, epoch=0.1, loss=loss, lr=0.0).as_json()))["loss"] == loss


def test_validation_must_not_overwrite_training() -> None:
    with pytest.raises(ValueError, match=r"got \['loss'\].*'val_'"):
        StepRecord(step=1, epoch=0.0, loss=1.0, lr=0.0, validation={"loss": 2.0})


def test_every_key_of_a_step_is_guarded() -> None:
    full = StepRecord(
        step=1, epoch=0.0, loss=1.0, lr=0.0, grad_norm=1.0, images_per_second=1.0, data_wait=0.0, seconds=1.0, memory_bytes=1,
        loss_scale=1.0, skipped=True, nonfinite_source="x", mfu=0.1,
    )  # fmt: skip
    for key in full.as_json():
        with pytest.raises(ValueError, match="must not be named"):
            StepRecord(step=1, epoch=0.0, loss=1.0, lr=0.0, validation={key: 2.0})


def test_header_is_json() -> None:
    header = RunHeader(
        run_dir="runs/a", command="simmim pretrain", device="cpu", world_size=2,
        ops=(OpRow(op="a", implementation="b", reason="c"),),
        plan={"peak": math.inf, "steps": 3},
    )  # fmt: skip
    written = json.loads(json.dumps(header.as_json(), allow_nan=False))
    assert written["ops"] == [{"op": "a", "implementation": "b", "reason": "c"}]
    assert written["plan"] == {"peak": None, "steps": 3}
