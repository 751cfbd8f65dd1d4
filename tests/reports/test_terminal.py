"""The terminal: a bar where a person looks, plain lines in a file, silence when nobody reads any more."""

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from simmim_scale.reports.records import GIB, OpRow, RunHeader, StepRecord
from simmim_scale.reports.terminal import Terminal, TerminalSink, TolerantStream, configure_logging, format_count, format_duration

HEADER = RunHeader(
    run_dir="runs/a", command="simmim pretrain x", device="cpu, 2 threads", world_size=2, versions={"torch": "2.11"},
    ops=(OpRow(op="window_attention", implementation="reference", reason="[no] CUDA"),), plan={"steps": 40}, start_step=10,
)  # fmt: skip


class _Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class _Plain(io.StringIO):
    encoding = "ascii"


@pytest.fixture
def _restore_logging() -> Iterator[None]:
    names = ("simmim_scale", "launch", "data_tools")
    before = {name: (list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in names}
    yield
    for name, (handlers, level) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, True
        logger.setLevel(level)


def record(step: int, **values: object) -> StepRecord:
    return StepRecord(
        step=step, epoch=step / 10, loss=0.5, lr=1e-3, images_per_second=123.4, data_wait=0.031, memory_bytes=2 * GIB, **values
    )  # type: ignore[arg-type]


def run(stream: io.StringIO, total: int = 20, **options: int) -> str:
    sink = TerminalSink(Terminal(stream), total_steps=total, **options)
    sink.write_header(HEADER)
    for step in range(options.get("start_step", 0) + 1, total + 1):
        sink.write_step(record(step, validation={"val_loss": 0.75, "val_baseline": 0.9} if step == total else None))
    sink.close()
    sink.close()
    return stream.getvalue()


def test_redirected_output_is_plain_lines() -> None:
    text = run(_Plain(), every_steps=10)
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.isascii()
    steps = [line for line in text.splitlines() if " step " in line and "/20" in line]
    assert [line.split(" step ")[1].split("/")[0] for line in steps] == ["1", "10", "20"]
    for fact in ("loss 0.5000", "lr 1.00e-03", "images/s 123", "data wait 3%", "memory 2.00 GiB", "eta"):
        assert fact in steps[1]
    assert "validation at step 20: loss 0.7500, baseline 0.9000" in text


def test_resumed_run_shows_its_first_step() -> None:
    assert "step 14/20" in run(_Plain(), start_step=13, every_steps=10)


def test_header_names_implementations_and_why() -> None:
    text = run(_Plain())
    for fact in ("op window_attention  reference ([no] CUDA)", "torch 2.11", "cpu, 2 threads, 2 ranks", "resumes at", "step 10"):
        assert fact in text


def test_terminal_shows_a_bar_and_markup_stays_text() -> None:
    text = run(_Tty())
    assert "\x1b[" in text
    assert "20/20" in text
    assert "images/s" in text
    assert "eta" in text
    assert "[no] CUDA" in text  # rich would swallow it as markup
    assert "validation at step 20" in text


def test_skipped_step_is_always_said() -> None:
    stream = _Plain()
    sink = TerminalSink(Terminal(stream), total_steps=100, every_steps=50)
    sink.write_step(record(7, skipped=True, nonfinite_source="layers.1.blocks.0"))
    assert "step 7 skipped" in stream.getvalue()
    assert "layers.1.blocks.0" in stream.getvalue()


@pytest.mark.usefixtures("_restore_logging")
def test_messages_share_the_stream() -> None:
    for stream in (_Plain(), _Tty()):
        configure_logging(Terminal(stream))
        logging.getLogger("simmim_scale.data").warning("one [image] was replaced")
        logging.getLogger("simmim_scale.data").debug("unseen")
        assert "one [image] was replaced" in stream.getvalue()
        assert "unseen" not in stream.getvalue()


def test_letters_that_the_stream_cannot_write_are_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    TolerantStream(stream).write("naïve ━\n")
    stream.flush()
    assert raw.getvalue() == b"na?ve ?\n"


PIPE_PROGRAM = """
import sys
from simmim_scale.reports.records import StepRecord
from simmim_scale.reports.terminal import Terminal, TerminalSink
sink = TerminalSink(Terminal(), total_steps=20000, every_steps=1)
for step in range(1, 20001):
    sink.write_step(StepRecord(step=step, epoch=0.0, loss=1.0, lr=1e-3))
sink.close()
sys.stderr.write("saved")
"""


def test_closed_pipe_does_not_end_the_run() -> None:
    process = subprocess.Popen([sys.executable, "-c", PIPE_PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()  # the reader is gone, as when ssh breaks
    assert process.stderr.read() == b"saved"
    process.stderr.close()
    assert process.wait(timeout=240) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3s"), (61, "1:01"), (3599.6, "1:00:00"), (7325, "2:02:05"), (100000, "1d 03h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.523, "0.52"), (48.23, "48.2"), (512.4, "512"), (12345.0, "12,345")])
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text
