"""What came of a sweep: the metric of every training, beside the published figures, as rows, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simmim_scale.reports.sinks import METRICS_FILE, read_metrics
from simmim_scale.sweeps.expand import Run, StageRun
from simmim_scale.sweeps.run import State, state_of
from simmim_scale.sweeps.spec import Sweep


@dataclass(frozen=True)
class Result:
    """One training's outcome.

    Attributes:
        state: new, interrupted or finished.
        value: the last value of the stage's metric; None where there is none yet.
        step: of the last record.
        avg_dist: of the run's masking, in pixels, where pre-training validated.
        curve: (step, value) of the metric.
    """

    state: State
    value: float | None
    step: int
    avg_dist: float | None
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Table:
    """Headings, and a row per run: its labels, our figures, the published ones; as text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def read_result(stage: StageRun, metric: str) -> Result:
    """What a run directory holds of a stage."""
    path = stage.run_dir / METRICS_FILE
    records = read_metrics(path) if path.is_file() else []
    curve = tuple((int(record["step"]), float(record[metric])) for record in records if record.get(metric) is not None)
    distances = [record["avg_dist"] for record in records if record.get("avg_dist") is not None]
    return Result(
        state=state_of(stage),
        value=curve[-1][1] if curve else None,
        step=int(records[-1]["step"]) if records else 0,
        avg_dist=distances[-1] if distances else None,
        curve=curve,
    )


def collect(sweep: Sweep, runs: Sequence[Run]) -> dict[str, dict[str, Result]]:
    """Results by the run's name and the stage's."""
    return {run.name: {stage.stage: read_result(stage, sweep.stages[stage.stage].metric) for stage in run.stages} for run in runs}


def list_table(sweep: Sweep, runs: Sequence[Run], results: dict[str, dict[str, Result]]) -> Table:
    """A row per run, laid out like the published table: labels, our figures, AvgDist where it differs, published figures."""
    stages = [stage.stage for stage in runs[0].stages] if runs else []
    distances = {found[stage].avg_dist for found in results.values() for stage in found} - {None}
    shown = ["AvgDist"] if len(distances) > 1 else []
    published = [f"{column} (published)" for column in sweep.published.columns]
    headings = (*(axis.name for axis in sweep.axes), *shown, *(_heading(sweep, stage) for stage in stages), *published)
    rows = []
    for run in runs:
        found = results[run.name]
        distance = next((found[stage].avg_dist for stage in stages if found[stage].avg_dist is not None), None)
        measured = [figure(found[stage], digits=sweep.stages[stage].digits) for stage in stages]
        theirs = sweep.published.values.get(run.label, [None] * len(published))
        rows.append((*run.labels, *([_plain(distance)] if shown else []), *measured, *map(_plain, theirs)))
    return Table(sweep.title or sweep.sweep, headings, tuple(rows), _note(sweep))


def grid_table(sweep: Sweep, runs: Sequence[Run], results: dict[str, dict[str, Result]], stage: str) -> Table:
    """The first axis down, the second across, as supplement's table 6: ours, and the published figure in brackets."""
    down, across = sweep.axes
    by_label = {run.labels: run for run in runs}
    rows = []
    for row in down.values:
        cells = []
        for column in across.values:
            run = by_label.get((row, column))
            theirs = sweep.published.values.get(f"{row}, {column}", [None])[0]
            ours = figure(results[run.name][stage], digits=sweep.stages[stage].digits) if run else "not run"
            cells.append(f"{ours} ({_plain(theirs)})" if theirs is not None else ours)
        rows.append((row, *cells))
    title = f"{sweep.title or sweep.sweep}: {_heading(sweep, stage)}"
    return Table(title, (f"{down.name} \\ {across.name}", *across.values), tuple(rows), _note(sweep))


def tables(sweep: Sweep, runs: Sequence[Run], results: dict[str, dict[str, Result]]) -> list[Table]:
    """The sweep's tables in its layout."""
    if sweep.layout == "grid" and runs:
        return [grid_table(sweep, runs, results, stage.stage) for stage in runs[0].stages]
    return [list_table(sweep, runs, results)]


def figure(result: Result, *, digits: int) -> str:
    """A result as a cell: the figure, with the state where it is not final."""
    if result.value is None:
        return "" if result.state is State.NEW else result.state.value
    text = f"{result.value:.{digits}f}"
    return text if result.state is State.FINISHED else f"{text} (step {result.step})"


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""
    lines = [f"**{table.title}**", "", _line(table.headings), _line(["---"] * len(table.headings))]
    lines += [_line(row) for row in table.rows]
    return "\n".join([*lines, "", table.note, ""]) if table.note else "\n".join([*lines, ""])


def as_csv(table: Table) -> str:
    """The table as comma-separated values."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([table.headings, *table.rows])
    return buffer.getvalue()


def folder_of(runs: Sequence[Run]) -> Path:
    """The directory of a sweep's runs, where its tables go."""
    return runs[0].stages[0].run_dir.parents[1]


def _heading(sweep: Sweep, stage: str) -> str:
    return sweep.stages[stage].title or sweep.stages[stage].metric


def _note(sweep: Sweep) -> str:
    return f"Published figures: {sweep.published.source}" if sweep.published.source else ""


def _plain(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.1f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
