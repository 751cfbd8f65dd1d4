"""Sinks: one object a step through kills and resumes, clear errors for what is missing, and no run lost over its curves."""

import json
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from simmim_scale.config.schema import ReportConfig
from simmim_scale.reports.records import RunHeader, StepRecord
from simmim_scale.reports.sinks import JsonlSink, Sinks, make_sinks, read_metrics
from simmim_scale.reports.terminal import Terminal

HEADER = RunHeader(run_dir="runs/a", command="simmim pretrain x", device="cpu", world_size=1)


def record(step: int, **values: object) -> StepRecord:
    return StepRecord(step=step, epoch=step / 10, loss=1 / step, lr=1e-3, **values)  # type: ignore[arg-type]


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_there_before_close(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write_step(record(1))
    assert steps_of(tmp_path) == [1]  # a kill -9 now loses nothing


def test_resume_drops_later_steps_and_the_cut_line(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    for step in range(1, 8):
        sink.write_step(record(step))
    sink.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the line a kill cut off
    resumed = JsonlSink(tmp_path, start_step=5)
    for step in (6, 7, 8):
        resumed.write_step(record(step))
    assert steps_of(tmp_path) == list(range(1, 9))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(starts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.booleans()), min_size=1, max_size=5))
def test_any_history_of_kills_leaves_one_object_a_step(tmp_path: Path, starts: list[tuple[int, int, bool]]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    done = 0
    for start, count, cut in starts:
        start = min(start, done)
        sink = JsonlSink(tmp_path, start_step=start)
        for step in range(start + 1, start + count + 1):
            sink.write_step(record(step))
        sink.close()
        done = start + count
        assert steps_of(tmp_path) == list(range(1, done + 1))
        if cut and done:  # the last line was not written to its end
            path.write_bytes(path.read_bytes()[:-7])
            done -= 1


def test_file_is_untouched_when_nothing_changes(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write_step(record(1))
    sink.close()
    before = (tmp_path / "metrics.jsonl").stat()
    JsonlSink(tmp_path, start_step=1).close()
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_read_metrics_sorts_and_skips_what_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 1}\n\xff\xfe\n[1]\n{"loss": 3}\n{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n{"st')
    assert read_metrics(path) == [{"step": 1, "loss": 5}, {"step": 2, "loss": 4}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_header_goes_to_environment_json(tmp_path: Path) -> None:
    JsonlSink(tmp_path).write_header(HEADER)
    assert json.loads((tmp_path / "environment.json").read_text())["command"] == "simmim pretrain x"


class _Failing:
    def __init__(self) -> None:
        self.calls = 0

    def write_step(self, record: StepRecord) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")


def test_optional_sink_that_fails_is_dropped_once(caplog: pytest.LogCaptureFixture) -> None:
    failing = _Failing()
    sinks = Sinks(optional=[failing])  # type: ignore[list-item]
    sinks.write_step(record(1))
    sinks.write_step(record(2))
    assert failing.calls == 1
    assert list(sinks) == []


def test_required_sink_that_fails_ends_the_run() -> None:
    with pytest.raises(OSError, match="No space left"):
        Sinks(required=[_Failing()]).write_step(record(1))  # type: ignore[list-item]


def _quiet_terminal(tmp_path: Path) -> Terminal:
    return Terminal((tmp_path / "log.txt").open("w"))


@pytest.mark.parametrize(
    ("report", "module", "package"),
    [
        (ReportConfig(wandb="project"), "wandb", "wandb"),
        (ReportConfig(tensorboard=True), "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_missing_package_is_an_error_that_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: ReportConfig, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        make_sinks(report, tmp_path, total_steps=3, terminal=_quiet_terminal(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()  # before any work


def test_folder_called_wandb_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(ValueError, match="found something else"):
        make_sinks(ReportConfig(wandb="project"), tmp_path, total_steps=3, terminal=_quiet_terminal(tmp_path))


class _Wandb(types.ModuleType):
    """Stands for the package: remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, object]] = []
        self.logged: list[tuple[int, dict[str, object]]] = []
        self.config = types.SimpleNamespace(update=lambda values, allow_val_change: None)
        self.finished = 0

    def init(self, **options: object) -> "_Wandb":
        self.starts.append(options)
        return self

    def log(self, values: dict[str, object], *, step: int) -> None:
        self.logged.append((step, values))

    def Image(self, picture: Image.Image) -> tuple[int, int]:  # noqa: N802
        return picture.size

    def finish(self) -> None:
        self.finished += 1


def test_wandb_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 1):
        with make_sinks(
            ReportConfig(wandb="project"),
            tmp_path,
            total_steps=2,
            start_step=start,
            config={"seed": 1},
            terminal=_quiet_terminal(tmp_path),
        ) as sinks:
            sinks.write_header(HEADER)
            sinks.write_step(record(start + 1, validation={"val_loss": 0.5}))
            sinks.write_picture(start + 1, "reconstructions", Image.new("RGB", (4, 3)))
    first, second = wandb.starts
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["project"] == "project"
    assert wandb.logged[0][1]["train/loss"] == 1.0
    assert wandb.logged[0][1]["validation/loss"] == 0.5
    assert wandb.logged[1] == (1, {"reconstructions": (4, 3)})
    assert [step for step, _ in wandb.logged] == [1, 1, 2, 2]
    assert wandb.finished == 2


def test_tensorboard_hides_what_a_resume_runs_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 6), (4, 8)):
        with make_sinks(
            ReportConfig(tensorboard=True), tmp_path, total_steps=8, start_step=start, terminal=_quiet_terminal(tmp_path)
        ) as sinks:
            sinks.write_header(HEADER)
            for step in range(start + 1, stop + 1):
                sinks.write_step(record(step, validation={"val_loss": 0.5} if step == 8 else None))
            sinks.write_picture(stop, "reconstructions", Image.new("RGB", (4, 3)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("validation/loss")] == [0.5]
    assert events.Images("reconstructions")
