"""The results of a sweep as files beside its runs: table.md, table.csv, and one self-contained page with curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from simmim_scale.reports.atomic_write import replace_file
from simmim_scale.reports.charts import Curve, draw_chart
from simmim_scale.sweeps.collect import Result, as_csv, folder_of, markdown, tables
from simmim_scale.sweeps.expand import Run
from simmim_scale.sweeps.run import State
from simmim_scale.sweeps.spec import Sweep

# Ten colours that can be told apart (Paul Tol's muted scheme, darkened); more runs begin again, and the tables name them.
COLOURS = ("#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#882255", "#44aa99", "#999933", "#aa4499", "#555555")
CHART = (10.0, 4.2)
MOST_CURVES = 10  # of one chart


def write_results(sweep: Sweep, runs: Sequence[Run], results: Mapping[str, Mapping[str, Result]]) -> list[Path]:
    """Writes table.md, table.csv and sweep.html into the sweep's directory; returns their paths."""
    folder = folder_of(runs)
    folder.mkdir(parents=True, exist_ok=True)
    made = tables(sweep, runs, results)
    page = _environment().get_template("page.html.j2").render(
        title=sweep.title or sweep.sweep,
        tables=made,
        charts=_charts(sweep, runs, results),
        finished=sum(result.state is State.FINISHED for found in results.values() for result in found.values()),
        total=sum(len(found) for found in results.values()),
    )  # fmt: skip
    files = {
        "table.md": "\n".join(markdown(table) for table in made),
        "table.csv": "\n".join(as_csv(table) for table in made),
        "sweep.html": page,
    }
    for name, text in files.items():
        replace_file(folder / name, text.encode())
    return [folder / name for name in files]


def _charts(sweep: Sweep, runs: Sequence[Run], results: Mapping[str, Mapping[str, Result]]) -> list[tuple[str, Markup]]:
    """(title, drawing) per stage that has curves; of many runs, one drawing for each value of the first axis."""
    charts = []
    for name, stage in sweep.stages.items():
        drawn = [run for run in runs if name in results[run.name] and len(results[run.name][name].curve) > 1]
        title = stage.title or stage.metric
        groups = {"": drawn} if len(drawn) <= MOST_CURVES else _by_first_label(drawn)
        for group, members in groups.items():
            if members:
                svg = draw_chart([_curve(run, results[run.name][name], index) for index, run in enumerate(members)], size=CHART)
                charts.append((f"{title}, {group}" if group else title, Markup(svg)))
    return charts


def _by_first_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.labels[0], []).append(run)
    return groups


def _curve(run: Run, result: Result, index: int) -> Curve:
    steps, values = zip(*result.curve, strict=True)
    return Curve(steps, values, run.label, COLOURS[index % len(COLOURS)], marked=len(steps) < 60)


def _environment() -> Environment:
    return Environment(loader=PackageLoader("simmim_scale.sweeps", "."), autoescape=True, undefined=StrictUndefined)
