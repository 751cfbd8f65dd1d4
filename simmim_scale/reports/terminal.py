"""What a person sees while a run goes on: a progress bar on a terminal, plain ASCII lines where output is redirected.

`configure_logging` sends log messages through the same stream, so that they appear above the bar and not inside it.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from PIL import Image
from rich.console import Console, Group
from rich.highlighter import NullHighlighter
from rich.live import Live
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from simmim_scale.reports.records import GIB, RunHeader, StepRecord
from simmim_scale.reports.throughput import TimeLeft

DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
PLAIN_FORMAT = "%(asctime)s %(levelname)s %(message)s"
REFRESHES_PER_SECOND = 4


class TolerantStream:
    """A text stream that goes silent when its reader is gone (closed pipe, lost terminal) instead of ending the run.

    A launcher whose ssh connection breaks leaves ranks writing into a closed pipe, at the very moment they should save.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._gone = False

    def write(self, text: str) -> int:
        self._guard(lambda: self._stream.write(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        self._guard(self._stream.flush)

    def isatty(self) -> bool:
        return not self._gone and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "ascii"

    def _encodable(self, text: str) -> str:
        return text.encode(self.encoding, "replace").decode(self.encoding)

    def _guard(self, action: Callable[[], Any]) -> None:
        if self._gone:
            return
        try:
            action()
        except OSError:
            self._gone = True
            self._discard_buffer()

    def _discard_buffer(self) -> None:
        """Point the descriptor at nothing, or the flush at interpreter exit fails and changes the exit code."""
        if self._stream not in (sys.__stdout__, sys.__stderr__):
            return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


def format_count(value: float) -> str:
    """A rate with three significant digits: 0.52, 7.31, 48.2, 512, 12,345."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def format_duration(seconds: float) -> str:
    """42s, 12:03 (minutes), 5:12:03 (hours) or 3d 04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 86400}d {whole // 3600 % 24:02d}h"


def step_facts(record: StepRecord) -> list[tuple[str, str]]:
    """(label, value) of what is worth seeing at every step, most important first."""
    facts = [("loss", f"{record.loss:.4f}"), ("lr", f"{record.lr:.2e}")]
    if record.images_per_second is not None:
        facts.append(("images/s", format_count(record.images_per_second)))
    if record.data_wait is not None:
        facts.append(("data wait", f"{record.data_wait:.0%}"))
    if record.memory_bytes is not None:
        facts.append(("memory", f"{record.memory_bytes / GIB:.2f} GiB"))
    if record.mfu is not None:
        facts.append(("MFU", f"{record.mfu:.1%}"))
    if record.grad_norm is not None:
        facts.append(("grad norm", f"{record.grad_norm:.2f}"))
    if record.loss_scale is not None:
        facts.append(("loss scale", f"{record.loss_scale:.0f}"))
    return facts


def validation_line(record: StepRecord) -> str:
    """One line for a step that validated, "" for others: `validation at step 200: loss 0.5123, baseline 0.8014`."""
    if not record.validation:
        return ""
    values = ", ".join(f"{name.removeprefix('val_')} {value:.4f}" for name, value in record.validation.items())
    return f"validation at step {record.step}: {values}"


def skipped_line(record: StepRecord) -> str:
    """One line for a step whose update was skipped, "" for others."""
    if not record.skipped:
        return ""
    source = f"; first non-finite output: {record.nonfinite_source}" if record.nonfinite_source else ""
    return f"step {record.step} skipped: loss or gradients were not finite (loss {record.loss}){source}"


class Terminal:
    """Where lines for a person go. Progress bar and log messages must share one, or they overwrite each other.

    Args:
        stream: None: standard output.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = TolerantStream(stream or sys.stdout)
        self.interactive = self.stream.isatty()
        self.console = Console(file=self.stream, highlight=False)  # type: ignore[arg-type]  # rich uses what the stream has

    def line(self, text: str) -> None:
        """Write one dated plain line."""
        self.stream.write(f"{time.strftime(DATE_FORMAT)} {text}\n")
        self.stream.flush()


class TerminalSink:
    """Progress on a terminal, or a line every `every_steps` steps where there is none.

    Args:
        terminal: where to write.
        total_steps: length of the run.
        start_step: steps done before this start.
        every_steps: distance of two lines when output is redirected; validations and skipped steps are always shown.
    """

    def __init__(self, terminal: Terminal, *, total_steps: int, start_step: int = 0, every_steps: int = 10) -> None:
        self._terminal = terminal
        self._total = total_steps
        self._every = every_steps
        self._start = start_step
        self._time_left = TimeLeft(total_steps)
        self._time_left.update(start_step)
        self._board = _Board(terminal.console, total_steps, start_step) if terminal.interactive else None

    def write_header(self, header: RunHeader) -> None:
        if self._board:
            self._terminal.console.print(_header_table(header))
        else:
            for line in _header_lines(header):
                self._terminal.line(line)

    def write_step(self, record: StepRecord) -> None:
        left = self._time_left.update(record.step)
        if self._board:
            self._board.show(record, left)
        elif record.step % self._every == 0 or record.step in (self._start + 1, self._total):
            self._terminal.line(self._plain_step(record, left))
        for line in (validation_line(record), skipped_line(record)):
            if line:
                self._message(line)

    def write_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """A terminal shows none."""

    def close(self) -> None:
        if self._board:
            self._board.close()
        self._terminal.stream.flush()

    def _plain_step(self, record: StepRecord, left: float | None) -> str:
        facts = "  ".join(f"{label} {value}" for label, value in step_facts(record))
        eta = "" if left is None else f"  eta {format_duration(left)}"
        return f"step {record.step}/{self._total}  epoch {record.epoch:.2f}  {facts}{eta}"

    def _message(self, line: str) -> None:
        if self._board:
            self._terminal.console.print(Text(line, style="yellow" if "skipped" in line else "green"))
        else:
            self._terminal.line(line)


class _Board:
    """The live lines: a bar with steps and time left, and below it the facts of the latest step."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self._bar = Progress(
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("[dim]steps[/]"),
            TextColumn("[dim]epoch[/] {task.fields[epoch]}"),
            TextColumn("[dim]eta[/] {task.fields[eta]}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, epoch="-", eta="-")
        self._facts = Text("starting", style="dim")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_SECOND, transient=False)
        self._started = False

    def _render(self) -> Group:
        return Group(self._bar.get_renderable(), self._facts)

    def show(self, record: StepRecord, left: float | None) -> None:
        eta = "-" if left is None else format_duration(left)
        self._bar.update(self._task, completed=record.step, epoch=f"{record.epoch:.2f}", eta=eta)
        self._facts = Text.assemble(
            *(part for label, value in step_facts(record) for part in ((f"{label} ", "dim"), f"{value}   ")),
            no_wrap=True,
            overflow="ellipsis",
        )
        if not self._started:  # only now, so that the header and messages of the start stay plain
            self._live.start()
            self._started = True

    def close(self) -> None:
        if self._started:
            self._live.refresh()
            self._live.stop()
            self._started = False


def _header_rows(header: RunHeader) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    ranks = f"{header.world_size} rank{'s' if header.world_size != 1 else ''}"
    rows = [
        ("run directory", header.run_dir),
        ("device", f"{header.device}, {ranks}"),
        ("code", header.git or "not a git checkout"),
    ]
    rows += [("versions", versions)] if versions else []
    rows += [(f"op {row.op}", f"{row.implementation} ({row.reason})") for row in header.ops]
    rows += [(label, str(value)) for label, value in header.plan.items()]
    rows += [("resumes at", f"step {header.start_step}")] if header.start_step else []
    return rows


def _header_lines(header: RunHeader) -> list[str]:
    rows = _header_rows(header)
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {value}" for label, value in rows]


def _header_table(header: RunHeader) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), expand=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _header_rows(header):
        table.add_row(label, Text(value))
    return table


def configure_logging(terminal: Terminal, *, level: int = logging.INFO) -> None:
    """Send the package's log messages to `terminal`: above the progress bar on a terminal, as dated lines elsewhere.

    Call it once per process, with the terminal that `make_sinks` gets.
    """
    if terminal.interactive:
        handler: logging.Handler = RichHandler(
            console=terminal.console, show_path=False, markup=False, highlighter=NullHighlighter()
        )
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler(terminal.stream)  # type: ignore[arg-type]
        handler.setFormatter(logging.Formatter(PLAIN_FORMAT, datefmt=DATE_FORMAT))
    for name in ("simmim_scale", "launch", "data_tools"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
