"""The one training loop: pre-training and every downstream task go through `fit`.

Order of a step: wait for data, update, validate if due, write the record, save if due, leave if asked to.
A record is written before the save that covers it, so after a resume the log is cut at the step that was saved.

On a GPU a step's numbers are read when the next step is queued (`Loop.read_late`), so that the device never waits for the host;
before a validation, a save and the end, nothing is left unread. Asked to stop, such a run does one more step.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from PIL.Image import Image
from torch import Tensor

from simmim_scale.config.plan import Plan
from simmim_scale.engine.checkpoint import RunStateStore
from simmim_scale.engine.engine import Engine, LaunchedStep, StepResult
from simmim_scale.engine.runtime import Runtime
from simmim_scale.reports.records import GIB, StepRecord
from simmim_scale.reports.sinks import Sinks
from simmim_scale.reports.throughput import Reading, Throughput
from simmim_scale.train.ahead import Ahead, Batch, LoadingError, raise_problems
from simmim_scale.train.evaluate import Evaluator, evaluate
from simmim_scale.train.spikes import LossSpikeError, SpikeDetector
from simmim_scale.train.stop import StopRequest

log = logging.getLogger(__name__)


class Outcome(Enum):
    """How `fit` ended."""

    FINISHED = "finished"
    PREEMPTED = "preempted"  # a stop signal came; everything is saved


class TrainingLoader(Protocol):
    """An endless iterator of micro-batches of this rank that knows its position in the stream of samples."""

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, int]: ...


class Validation(Protocol):
    """What a task validates with: the same batches every time, and fresh evaluators."""

    def batches(self) -> Iterable[Batch]: ...
    def evaluators(self, step: int) -> Sequence[Evaluator]: ...
    def pictures(self, step: int) -> Mapping[str, Image]: ...


@dataclass(frozen=True)
class Cadence:
    """Every so many steps, and always at the last one."""

    every: int
    last: int

    def due(self, step: int) -> bool:
        return step == self.last or step % self.every == 0


def cadence(every_steps: int | None, plan: Plan) -> Cadence:
    """The configured number of steps, or once an epoch."""
    return Cadence(every=every_steps or max(1, round(plan.steps_per_epoch)), last=plan.total_steps)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything `fit` works with; built by the command line from configuration, plan and task.

    Args:
        read_late: read a step's numbers one step later, for devices that work on while the host goes ahead.
        skipped_samples: passed over after rolling back (train/rollbacks.py); they shift the position in the data.
        spikes: watches the loss; None: nothing is a spike.
        facts: written into every save and compared on resume, for instance the number of samples.
        load_errors: what the loader raises where disks, servers or the set itself fail.
    """

    engine: Engine
    plan: Plan
    runtime: Runtime
    loader: TrainingLoader
    validation: Validation | None
    probing: Validation | None = None
    validate: Cadence
    probe: Cadence | None = None
    save: Cadence
    store: RunStateStore
    sinks: Sinks
    meter: Throughput
    stop: StopRequest
    facts: Mapping[str, Any]
    read_late: bool = False
    skipped_samples: int = 0
    spikes: SpikeDetector | None = None
    load_errors: tuple[type[Exception], ...] = (OSError,)


@dataclass(frozen=True)
class _Underway:
    """A launched step and what the meter read then."""

    launched: LaunchedStep
    reading: Reading


def fit(loop: Loop) -> Outcome:
    """Trains from the engine's step to the plan's last one. All ranks call it together.

    Returns:
        How it ended; when preempted, the run state of the last finished step is saved.

    Raises:
        LossSpikeError: the loss spiked.
        LoadingError: no more data on some rank; raised on all of them, with the run state of the last finished step saved.
    """
    ahead = _fetch_ahead(loop)
    underway: _Underway | None = None
    stopping = postponed = False
    while loop.engine.step < loop.plan.total_steps:
        previous, underway = underway, _launch(loop, ahead)
        if previous is not None:
            stopping = _conclude(loop, previous)
        # Every rank knows the same here: steps are counted alike, and a request to stop is reduced with a step's loss.
        step = loop.engine.step
        saving = loop.save.due(step) or postponed
        due = saving or bool(_evaluations(loop, step))
        if due or stopping or not loop.read_late:
            stopping = _conclude(loop, underway) or stopping
            underway = None
            # A state that a spike may have spoilt is none to go back to: the save waits for a loss that is not high.
            postponed = saving and loop.spikes is not None and loop.spikes.suspicious and step < loop.plan.total_steps
            if stopping or (saving and not postponed):
                save_run_state(loop, last=stopping or step == loop.plan.total_steps)
        if stopping and step < loop.plan.total_steps:
            raise_problems(loop.runtime, ahead.problem)
            return Outcome.PREEMPTED
    return Outcome.FINISHED


def _fetch_ahead(loop: Loop) -> Ahead:
    """The batches, with those of the first steps; how far ahead is how many steps pass until all ranks know of a stop."""
    ahead = Ahead(
        iter(loop.loader),
        accumulation=loop.plan.accumulation,
        steps=loop.plan.total_steps - loop.engine.step,
        depth=2 if loop.read_late else 1,
        errors=loop.load_errors,
    )
    with loop.meter.waiting():
        ahead.fill()
    raise_problems(loop.runtime, ahead.problem)
    return ahead


def _launch(loop: Loop, ahead: Ahead) -> _Underway:
    # Batches are fetched before the update, so that waiting and computing are told apart.
    with loop.meter.waiting():
        ahead.fill()
    on_device = [_to_device(batch, loop.runtime) for batch in ahead.take()]
    with loop.meter.computing():
        leaving = ahead.problem is not None
        launched = loop.engine.launch_step(on_device, stop=lambda: leaving or loop.stop.received is not None)
    return _Underway(launched, loop.meter.step())


def _conclude(loop: Loop, underway: _Underway) -> bool:
    """Read a step's numbers, validate if due, write the record; whether some rank was asked to stop."""
    with loop.meter.computing():
        result = loop.engine.finish_step(underway.launched)
    _report(loop, _measure(loop, result, underway.reading))
    spike = loop.spikes.observe(result.loss) if loop.spikes is not None and not result.skipped else None
    if spike is not None:
        raise LossSpikeError(f"step {result.step}: {spike}")
    return result.stop


def save_run_state(loop: Loop, *, last: bool) -> None:
    """A complete, atomic save of the current step; complete on return when it is the last one before leaving."""
    step = loop.engine.step
    facts = {**loop.facts, "position": loop.plan.position_at(step) + loop.skipped_samples}
    with loop.meter.paused("saving"):
        loop.store.save(loop.engine, client_state=facts)
        if last:
            loop.store.wait()


def _evaluations(loop: Loop, step: int) -> list[Validation]:
    """What is to be evaluated after this step."""
    pairs = ((loop.validation, loop.validate), (loop.probing, loop.probe))
    return [what for what, when in pairs if what is not None and when is not None and when.due(step)]


def _measure(loop: Loop, result: StepResult, reading: Reading) -> StepRecord:
    cost = loop.store.take_cost()
    validation: dict[str, float] = {}
    for what in _evaluations(loop, result.step):
        with loop.meter.paused("validation"):
            validation |= _evaluate(loop, what, result.step)
    return StepRecord(
        step=result.step,
        epoch=loop.plan.epoch_at(result.step),
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm if result.grad_norm is None or math.isfinite(result.grad_norm) else None,
        images_per_second=reading.images_per_second,
        data_wait=reading.data_wait,
        seconds=reading.seconds,
        mfu=reading.mfu,
        spent=loop.meter.spent(),
        memory_bytes=loop.runtime.memory_bytes(),
        loss_scale=result.loss_scale,
        skipped=result.skipped,
        nonfinite_source=result.nonfinite_source,
        validation=validation or None,
        save_seconds=None if cost is None else cost.seconds,
        save_gib=None if cost is None else cost.nbytes / GIB,
    )


def _evaluate(loop: Loop, what: Validation, step: int) -> dict[str, float]:
    """The figures; none where the images cannot be read, which is no reason to stop a training that can go on."""
    try:
        return evaluate(loop.engine, what.batches(), what.evaluators(step), loop.runtime, load_errors=loop.load_errors)
    except LoadingError as error:
        if loop.runtime.is_main:
            log.error("no validation at step %d, training goes on: %s", step, error)
        return {}


def _report(loop: Loop, record: StepRecord) -> None:
    loop.sinks.write_step(record)
    if record.validation is not None and loop.validation is not None:
        for name, picture in loop.validation.pictures(record.step).items():
            loop.sinks.write_picture(record.step, name, picture)


def _to_device(batch: Batch, runtime: Runtime) -> dict[str, Tensor]:
    return {name: value.to(runtime.device, non_blocking=True) for name, value in batch.items()}
