"""Where records go: RUN_DIR/metrics.jsonl and environment.json always, TensorBoard and Weights & Biases when asked for.

`make_sinks` builds them all, the terminal (`reports/terminal.py`) included; only the main rank makes any.
"""

import importlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from simmim_scale.config.schema import ReportConfig
from simmim_scale.reports.atomic_write import replace_file
from simmim_scale.reports.records import RunHeader, StepRecord
from simmim_scale.reports.terminal import Terminal, TerminalSink

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"


class Sink(Protocol):
    """Something that takes what a run reports. `close` may be called twice."""

    def write_header(self, header: RunHeader) -> None: ...

    def write_step(self, record: StepRecord) -> None: ...

    def write_picture(self, step: int, name: str, picture: Image.Image) -> None: ...

    def close(self) -> None: ...


def last_metrics(path: Path) -> dict[str, float]:
    """The last loss and the last value of everything that was validated (`val_*`) in a metrics file; {} where there is none."""
    records = read_metrics(path)
    names = dict.fromkeys(name for record in records for name in record if name == "loss" or name.startswith("val_"))
    found = {name: [record[name] for record in records if isinstance(record.get(name), float | int)] for name in names}
    return {name: float(values[-1]) for name, values in found.items() if values}


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """A step's object, or None where the line is not one (cut off by a crash)."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All steps of a metrics file, by step; lines that a crash cut off are left out. A missing file has none."""
    if not path.exists():
        return []
    records = {}
    with path.open("rb") as file:
        for line in file:
            record = _parse_line(line)
            if record is not None:
                records[record["step"]] = record
    return [records[step] for step in sorted(records)]


class JsonlSink:
    """Appends one JSON object a step, flushed line by line, so that a killed run loses at most the line it was writing.

    Args:
        run_dir: existing directory; the file is `metrics.jsonl` in it.
        start_step: steps done before this start. What the file says about later steps (the run was killed after its last save) is
            dropped, since those steps are run again: there is exactly one object a step.
    """

    def __init__(self, run_dir: Path, *, start_step: int = 0) -> None:
        self._run_dir = run_dir
        self.path = run_dir / METRICS_FILE
        self.truncate_after(start_step)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def truncate_after(self, step: int) -> None:
        """Keep the records up to and including `step`, once each; the file is replaced in one go, if anything changes."""
        if not self.path.exists():
            return
        kept, lines = {}, self.path.read_bytes().splitlines(keepends=True)
        for line in lines:
            record = _parse_line(line)
            if record is not None and record["step"] <= step:
                kept[record["step"]] = line.rstrip(b"\n") + b"\n"
        content = [kept[key] for key in sorted(kept)]
        if content != lines:
            log.info(
                "%s: kept %d records up to step %d, dropped %d.", METRICS_FILE, len(content), step, len(lines) - len(content)
            )
            replace_file(self.path, b"".join(content))

    def write_header(self, header: RunHeader) -> None:
        content = json.dumps(header.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
        replace_file(self._run_dir / ENVIRONMENT_FILE, content.encode() + b"\n")

    def write_step(self, record: StepRecord) -> None:
        self._file.write(json.dumps(record.as_json(), allow_nan=False) + "\n")

    def write_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Pictures are files of their own (RUN_DIR/gallery)."""

    def close(self) -> None:
        self._file.close()


def _numbers(record: StepRecord) -> dict[str, float]:
    """What can be plotted: "train/loss", ... and "validation/loss" for "val_loss"."""
    values = {key: value for key, value in record.as_json().items() if isinstance(value, int | float) and key != "step"}
    named = {}
    for key, value in values.items():
        name = f"validation/{key.removeprefix('val_')}" if key.startswith("val_") else f"train/{key}"
        named[name] = float(value)
    return named


def _need(module: str, package: str, setting: str, attribute: str) -> ModuleType:
    """Import an optional package, or say how to get it.

    Raises:
        ValueError: it is not installed (or a directory of that name is in its place).
    """
    try:
        found = importlib.import_module(module)
    except ImportError as cause:
        raise ValueError(
            f"{setting}: needs the package {package}, which cannot be imported ({cause})."
            f" Install it with `pip install {package}`, or leave the setting out."
        ) from cause
    if not hasattr(found, attribute):
        raise ValueError(
            f"{setting}: needs the package {package}, but `import {module}` found something else without {attribute!r}."
            f" Install it with `pip install {package}`, and run outside a directory that holds a folder of that name."
        )
    return found


class TensorBoardSink:
    """Event files in RUN_DIR/tensorboard; a resume hides what an earlier start wrote past its last save."""

    def __init__(self, run_dir: Path, *, start_step: int = 0) -> None:
        tensorboard = _need("torch.utils.tensorboard", "tensorboard", "report.tensorboard", "SummaryWriter")
        self._writer = tensorboard.SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def write_header(self, header: RunHeader) -> None:
        self._writer.add_text("run", f"```json\n{json.dumps(header.as_json(), indent=2)}\n```", header.start_step)

    def write_step(self, record: StepRecord) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record.step)

    def write_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; its id is kept in RUN_DIR/wandb_id.txt, so that a resume continues the same run."""

    def __init__(self, run_dir: Path, *, project: str, config: Mapping[str, Any]) -> None:
        self._wandb = _need("wandb", "wandb", "report.wandb", "init")
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            replace_file(id_file, secrets.token_hex(4).encode())
        self._run = self._wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )

    def write_header(self, header: RunHeader) -> None:
        self._run.config.update({"environment": header.as_json()}, allow_val_change=True)

    def write_step(self, record: StepRecord) -> None:
        self._run.log(_numbers(record), step=record.step)

    def write_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Sinks:
    """Several sinks as one. `required` ones must work; an optional one that cannot write any more is reported once and dropped.

    `Sinks()` swallows everything: it is what the ranks other than the main one use.
    """

    def __init__(self, required: Sequence[Sink] = (), optional: Sequence[Sink] = ()) -> None:
        self._required = list(required)
        self._optional = list(optional)

    def write_header(self, header: RunHeader) -> None:
        self._each(lambda sink: sink.write_header(header))

    def write_step(self, record: StepRecord) -> None:
        self._each(lambda sink: sink.write_step(record))

    def write_picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._each(lambda sink: sink.write_picture(step, name, picture))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def __iter__(self) -> Iterator[Sink]:
        """The sinks that still work."""
        return iter([*self._required, *self._optional])

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _each(self, write: Callable[[Sink], None]) -> None:
        for sink in self._required:
            write(sink)
        for sink in list(self._optional):
            try:
                write(sink)
            except OSError as cause:  # a full disk or a lost network must not end a run of days over its curves
                log.warning("%s stopped: %s. The run goes on without it.", type(sink).__name__, cause)
                self._optional.remove(sink)


def make_sinks(
    report: ReportConfig,
    run_dir: Path,
    *,
    total_steps: int,
    start_step: int = 0,
    config: Mapping[str, Any] | None = None,
    terminal: Terminal | None = None,
) -> Sinks:
    """All sinks of a run; call it on the main rank, before any work, since what is missing is an error here.

    Args:
        report: what to write.
        run_dir: existing directory.
        total_steps: length of the run, for progress and time left.
        start_step: steps done before this start.
        config: the resolved configuration, for Weights & Biases.
        terminal: the one that `configure_logging` got; None: standard output.

    Raises:
        ValueError: a package that was asked for is not installed.
    """
    optional: list[Sink] = []
    if report.tensorboard:
        optional.append(TensorBoardSink(run_dir, start_step=start_step))
    if report.wandb:
        optional.append(WandbSink(run_dir, project=report.wandb, config=config or {}))
    lines = TerminalSink(
        terminal or Terminal(), total_steps=total_steps, start_step=start_step, every_steps=report.terminal_every_steps
    )
    return Sinks([JsonlSink(run_dir, start_step=start_step), lines], optional)
