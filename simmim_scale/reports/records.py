"""What a run reports: one `StepRecord` per optimizer step and one `RunHeader` per start. Plain values, no tensors.

The sinks (`reports/sinks.py`, `reports/terminal.py`) write them; `reports/page.py` reads them back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null; every other value stays."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as measured.

    Args:
        step: updates done including this one, so the first record of a run has step 1.
        epoch: passes over the training set including this step, with its fraction.
        loss: mean over micro-batches and ranks; NaN where it was not finite.
        lr: learning rate this step used (that of a group without layer decay).
        grad_norm: global L2 norm before clipping; None where the engine has none (a skipped fp16 step).
        images_per_second: over all ranks, averaged over the meter's window.
        data_wait: share (0 to 1) of the window that was spent waiting for data.
        seconds: wall-clock seconds of this step alone, without validation and saving.
        memory_bytes: peak of the device (resident memory on CPU).
        loss_scale: of fp16; None in other precisions.
        skipped: the update was not applied, since loss or gradients were not finite.
        nonfinite_source: name of the first block whose output was not finite, where one was looked for.
        mfu: share (0 to 1) of the devices' peak that forward and backward of the model used; None where unknown.
        spent: seconds since the record before, by what they were spent on (reports/throughput.py); includes the save after it.
        save_seconds, save_gib: of a save that became complete since the record before: time from its beginning until it was
            complete (training stood still as long as `spent` says), and its size on the disk.
        validation: results of a validation after this step, for instance {"val_loss": .., "val_baseline": ..}.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    loss_scale: float | None = None
    skipped: bool = False
    nonfinite_source: str | None = None
    mfu: float | None = None
    spent: Mapping[str, float] | None = None
    validation: Mapping[str, float] | None = None
    save_seconds: float | None = None
    save_gib: float | None = None

    def __post_init__(self) -> None:
        clash = sorted(set(self.validation or {}) & _STEP_KEYS)
        if clash:
            raise ValueError(
                f"validation: results must not be named like values of training, got {clash}. Begin their names with 'val_'."
            )

    def as_json(self) -> dict[str, Any]:
        """The record as one flat object of JSON values: NaN and infinity are null, what does not apply is left out."""
        always = {"step": self.step, "epoch": round(self.epoch, 6), "loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm}
        optional = {
            "images_per_second": self.images_per_second,
            "data_wait": self.data_wait,
            "seconds": self.seconds,
            "memory_gib": None if self.memory_bytes is None else round(self.memory_bytes / GIB, 4),
            "loss_scale": self.loss_scale,
            "mfu": self.mfu,
            "save_seconds": None if self.save_seconds is None else round(self.save_seconds, 4),
            "save_gib": None if self.save_gib is None else round(self.save_gib, 4),
            "skipped": self.skipped or None,
            "nonfinite_source": self.nonfinite_source,
        }
        optional |= {spent_key(what): round(seconds, 6) for what, seconds in (self.spent or {}).items() if seconds}
        shown = {key: value for key, value in optional.items() if value is not None}
        return {key: _finite_or_none(value) for key, value in {**always, **shown, **(self.validation or {})}.items()}


def spent_key(what: str) -> str:
    """Name in a record of the seconds that were spent on `what`: spent_data_wait."""
    return f"spent_{what.replace(' ', '_')}"


_STEP_KEYS = {
    *("step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "seconds", "memory_gib"),
    *("loss_scale", "mfu", "skipped", "nonfinite_source", "save_seconds", "save_gib"),
}


@dataclass(frozen=True, kw_only=True)
class OpRow:
    """Which implementation of an op runs, and why that one."""

    op: str
    implementation: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """What a person needs to know about a run before its first step.

    Args:
        run_dir: the run's directory.
        command: the command line that starts (and resumes) it.
        device: the device in words, for instance "cpu (8 threads)".
        world_size: number of ranks.
        git: version of the code, None outside a git checkout.
        versions: package name -> version.
        machine: further facts (operating system, cores, memory).
        ops: one row per op.
        plan: label -> value, in the order to show: batch arithmetic, steps, learning rates, model size.
        start_step: steps that were done before this start; 0 for a new run.
    """

    run_dir: str
    command: str
    device: str
    world_size: int
    git: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    ops: tuple[OpRow, ...] = ()
    plan: Mapping[str, str | int | float] = field(default_factory=dict)
    start_step: int = 0

    def as_json(self) -> dict[str, Any]:
        """JSON values, as written to RUN_DIR/environment.json."""
        return {
            "run_dir": self.run_dir,
            "command": self.command,
            "device": self.device,
            "world_size": self.world_size,
            "git": self.git,
            "start_step": self.start_step,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "ops": [{"op": row.op, "implementation": row.implementation, "reason": row.reason} for row in self.ops],
            "plan": {key: _finite_or_none(value) for key, value in self.plan.items()},
        }
