"""The order of things in `fit`, with everything around it replaced by records of what was called."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from simmim_scale.config.plan import Plan, make_plan
from simmim_scale.config.schema import OptimizerConfig, StepConfig, TrainConfig
from simmim_scale.engine.checkpoint import SaveCost
from simmim_scale.engine.engine import StepResult
from simmim_scale.reports.throughput import Throughput
from simmim_scale.train.ahead import LoadingError
from simmim_scale.train.evaluate import evaluate
from simmim_scale.train.loop import Cadence, Loop, Outcome, cadence, fit
from simmim_scale.train.spikes import LossSpikeError, SpikeDetector
from simmim_scale.train.stop import StopRequest


def make(steps: int = 6, accumulation: int = 2) -> Plan:
    train = TrainConfig(steps=steps, global_batch=4, micro_batch=4 // accumulation)
    return make_plan(train, OptimizerConfig(), StepConfig(warmup_epochs=0), num_samples=10, world_size=1)


@dataclass
class FakeRuntime:
    device: str = "cpu"
    is_main: bool = True
    world_size: int = 1
    others: list = field(default_factory=list)  # what other ranks gather

    def gather_objects(self, value):
        return [value, *self.others]

    def any_rank(self, flag):
        return flag or any(other is not None for other in self.others)

    def memory_bytes(self) -> int:
        return 1


@dataclass
class FakeEngine:
    """Queues steps like a GPU: what a step amounted to is known when it is finished, also whether a stop was asked for then."""

    events: list
    step: int = 0
    seen: list = field(default_factory=list)
    losses: dict = field(default_factory=dict)  # of steps whose loss is not 1 / step

    def launch_step(self, micro_batches, *, stop):
        self.step += 1
        self.seen.append([int(batch["position"]) for batch in micro_batches])
        self.events.append(f"train {self.step}")
        return self.step, stop()

    def finish_step(self, launched) -> StepResult:
        step, stop = launched
        return StepResult(step, self.losses.get(step, 1.0 / step), 0.1, 1.0, False, None, None, 0, stop=stop)

    def evaluate_step(self, batch):
        self.events.append("evaluate")
        return {"value": batch["position"]}


@dataclass
class FakeStore:
    events: list
    cost: SaveCost | None = None

    def save(self, engine, client_state) -> None:
        self.events.append(f"save {engine.step} at {client_state['position']}")
        self.cost = SaveCost(engine.step, 2**29, 0.25, 1.5)

    def wait(self) -> None:
        self.events.append("complete")

    def take_cost(self) -> SaveCost | None:
        cost, self.cost = self.cost, None
        return cost


@dataclass
class FakeSinks:
    events: list
    records: list = field(default_factory=list)

    def write_step(self, record) -> None:
        self.records.append(record)
        self.events.append(f"record {record.step}")

    def write_picture(self, step, name, picture) -> None:
        self.events.append(f"picture {step} {name}")


class Total:
    """Evaluator: the sum of the positions it saw."""

    def __init__(self) -> None:
        self.total = 0

    def update(self, batch, outputs) -> None:
        self.total += int(outputs["value"])

    def state(self) -> int:
        return self.total

    def result(self, states) -> dict[str, float]:
        return {"val_total": float(sum(states))}


class FakeValidation:
    def batches(self):
        return [{"position": torch.tensor(5)}, {"position": torch.tensor(7)}]

    def evaluators(self, step):
        return [Total()]

    def pictures(self, step):
        return {"drawing": None}


def build(plan: Plan, *, stop: StopRequest | None = None, start: int = 0, validation=None, every=3, save=4, **settings):
    events: list[str] = []
    engine, sinks = FakeEngine(events, step=start), FakeSinks(events)
    loader = iter({"position": torch.tensor(position)} for position in range(1000))
    loop = Loop(
        engine=engine,
        plan=plan,
        runtime=FakeRuntime(),
        loader=loader,
        validation=validation,
        validate=Cadence(every, plan.total_steps),
        save=Cadence(save, plan.total_steps),
        store=FakeStore(events),
        sinks=sinks,
        meter=Throughput(plan.global_batch),
        stop=stop or StopRequest(),
        facts={"num_samples": 10},
        **settings,
    )
    return loop, events, sinks


def test_records_come_before_the_save_that_covers_them_and_every_step_has_one():
    loop, events, sinks = build(make(), validation=FakeValidation())
    assert fit(loop) is Outcome.FINISHED
    step3 = ["train 3", "evaluate", "evaluate", "record 3", "picture 3 drawing"]
    step6 = ["train 6", "evaluate", "evaluate", "record 6", "picture 6 drawing", "save 6 at 24", "complete"]
    assert events == [
        *("train 1", "record 1", "train 2", "record 2"),
        *step3,
        *("train 4", "record 4", "save 4 at 16", "train 5", "record 5"),
        *step6,
    ]
    assert [record.step for record in sinks.records] == [1, 2, 3, 4, 5, 6]
    assert sinks.records[2].validation == {"val_total": 12.0}
    assert sinks.records[0].validation is None
    costs = [(record.save_seconds, record.save_gib) for record in sinks.records]
    assert costs == [(None, None)] * 4 + [(1.5, 0.5), (None, None)], "the record after a save says what it took"
    assert sinks.records[-1].epoch == pytest.approx(2.4)


def test_a_step_takes_as_many_micro_batches_as_the_plan_says():
    loop, _, _ = build(make(steps=2, accumulation=4))
    fit(loop)
    assert loop.engine.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_stop_saves_the_step_in_hand_and_leaves():
    stop = StopRequest()
    loop, events, _ = build(make(), stop=stop)
    interrupt_step_2(loop, stop)
    assert fit(loop) is Outcome.PREEMPTED
    assert events == ["train 1", "record 1", "train 2", "record 2", "save 2 at 8", "complete"]


def interrupt_step_2(loop, stop):
    launch_step = loop.engine.launch_step

    def interrupted(batches, **arguments):
        if loop.engine.step == 1:
            stop.received = "SIGTERM"
        return launch_step(batches, **arguments)

    loop.engine.launch_step = interrupted


def test_a_late_reading_loop_has_the_next_step_queued_before_it_reads():
    loop, events, sinks = build(make(steps=5), validation=FakeValidation(), read_late=True)
    assert fit(loop) is Outcome.FINISHED
    assert events == [
        *("train 1", "train 2", "record 1"),
        # Validation at 3 and the save at 4: nothing is left unread before them, and each record comes before its save.
        *("train 3", "record 2", "evaluate", "evaluate", "record 3", "picture 3 drawing"),
        *("train 4", "record 4", "save 4 at 16"),
        *("train 5", "evaluate", "evaluate", "record 5", "picture 5 drawing", "save 5 at 20", "complete"),
    ]
    assert [record.step for record in sinks.records] == [1, 2, 3, 4, 5]
    assert [record.loss for record in sinks.records] == [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]


def test_a_late_reading_loop_stops_one_step_later_with_everything_saved():
    stop = StopRequest()
    loop, events, _ = build(make(), stop=stop, read_late=True)
    interrupt_step_2(loop, stop)
    assert fit(loop) is Outcome.PREEMPTED
    assert events == ["train 1", "train 2", "record 1", "train 3", "record 2", "record 3", "save 3 at 12", "complete"]


def test_another_ranks_stop_is_followed():
    loop, events, _ = build(make())
    launch_step = loop.engine.launch_step
    loop.engine.launch_step = lambda batches, stop: (launch_step(batches, stop=stop)[0], loop.engine.step == 2)
    assert fit(loop) is Outcome.PREEMPTED
    assert loop.stop.received is None
    assert events[-2:] == ["save 2 at 8", "complete"]


def test_a_stop_at_the_last_step_is_a_finished_run():
    stop = StopRequest()
    stop.received = "SIGTERM"
    loop, events, _ = build(make(), stop=stop, start=5)
    assert fit(loop) is Outcome.FINISHED
    assert events == ["train 6", "record 6", "save 6 at 24", "complete"]


def failing(after: int, error: Exception):
    for position in range(after):
        yield {"position": torch.tensor(position)}
    raise error


# Two micro-batches a step: batches for so many steps before the error, whether results are read late -> steps trained, saves.
@pytest.mark.parametrize(
    ("steps", "read_late", "trained", "saves"),
    [
        (3, False, 3, ["save 3 at 12"]),
        (4, False, 4, ["save 4 at 16"]),
        (4, True, 4, ["save 4 at 16"]),
        (5, True, 4, ["save 4 at 16"]),  # read at once, since a save is due
        (1, False, 0, []),
        (2, True, 0, []),
        (0, True, 0, []),
    ],
)
def test_without_data_what_was_trained_is_saved_and_the_cause_is_told(steps, read_late, trained, saves):
    loop, events, _ = build(make(), read_late=read_late)
    error = OSError("shard-7.tar: not read after 8 attempts")
    with pytest.raises(LoadingError, match=r"shard-7\.tar: not read after 8 attempts"):
        fit(replace(loop, loader=failing(2 * steps, error)))
    assert [event for event in events if event.startswith("save")] == saves
    assert [event for event in events if event.startswith("train")] == [f"train {step}" for step in range(1, trained + 1)]


def test_data_beyond_the_last_step_is_not_asked_for():
    loop, _, _ = build(make())
    assert fit(replace(loop, loader=failing(12, OSError("not needed")))) is Outcome.FINISHED


def test_the_data_of_another_rank_may_be_missing():
    loop, events, _ = build(make())
    loop.runtime.others = ["shard-3.tar: the server refuses it"]
    with pytest.raises(LoadingError, match="the server refuses it"):
        fit(loop)
    assert events == []


class UnreadableValidation(FakeValidation):
    def batches(self):
        yield {"position": torch.tensor(5)}
        raise OSError("validation.tar: not read after 8 attempts")


def test_a_validation_that_cannot_be_read_stops_no_training(caplog):
    loop, events, sinks = build(make(), validation=UnreadableValidation())
    assert fit(loop) is Outcome.FINISHED
    assert [record.validation for record in sinks.records] == [None] * 6
    assert events[-5:] == ["train 6", "evaluate", "record 6", "save 6 at 24", "complete"]
    assert "no validation at step 3, training goes on: validation.tar: not read after 8 attempts" in caplog.text


def test_the_batch_of_another_rank_may_be_missing():
    engine, runtime = FakeEngine([]), FakeRuntime(others=["validation.tar: the server refuses it"])
    with pytest.raises(LoadingError, match="the server refuses it"):
        evaluate(engine, FakeValidation().batches(), [Total()], runtime, load_errors=(OSError,))
    assert engine.events == []


def test_a_fault_of_the_code_is_no_lack_of_data():
    loop, _, _ = build(make())
    with pytest.raises(ZeroDivisionError):
        fit(replace(loop, loader=failing(3, ZeroDivisionError())))


def test_a_finished_run_trains_no_more():
    loop, events, _ = build(make(), start=6)
    assert fit(loop) is Outcome.FINISHED
    assert events == []


def test_cadence_defaults_to_an_epoch_and_never_misses_the_last_step():
    plan = make(steps=7)
    assert [step for step in range(1, 8) if cadence(None, plan).due(step)] == [2, 4, 6, 7]
    assert [step for step in range(1, 8) if cadence(5, plan).due(step)] == [5, 7]


def test_ranks_that_are_not_main_report_no_figures():
    runtime = FakeRuntime(is_main=False)
    engine = FakeEngine([])
    assert evaluate(engine, FakeValidation().batches(), [Total()], runtime, load_errors=(OSError,)) == {}
    assert engine.events == ["evaluate", "evaluate"]


def spikes(patience: int) -> SpikeDetector:
    return SpikeDetector(factor=2.0, window=4, patience=patience)


@pytest.mark.parametrize("read_late", [False, True])
def test_a_spike_ends_the_loop_and_no_state_is_saved_while_the_loss_is_high(read_late):
    loop, events, sinks = build(make(steps=9), spikes=spikes(3), read_late=read_late)
    loop.engine.losses = {4: 50.0, 5: 60.0, 6: 70.0}
    with pytest.raises(LossSpikeError, match=r"step 6: loss 70 for 3 steps, above 2 times the usual 0\.5"):
        fit(loop)
    assert [record.step for record in sinks.records] == [1, 2, 3, 4, 5, 6]
    assert not any(event.startswith("save") for event in events), "step 4 was due, but its loss was high"


def test_a_save_that_was_due_while_the_loss_was_high_comes_when_it_is_calm():
    loop, events, _ = build(make(steps=9), spikes=spikes(3))
    loop.engine.losses = {4: 50.0, 5: 60.0}
    assert fit(loop) is Outcome.FINISHED
    assert [event for event in events if event.startswith("save")] == ["save 6 at 24", "save 8 at 32", "save 9 at 36"]


def test_samples_that_were_passed_over_shift_the_position():
    loop, events, _ = build(make(), skipped_samples=100)
    fit(loop)
    assert [event for event in events if event.startswith("save")] == ["save 4 at 116", "save 6 at 124"]
