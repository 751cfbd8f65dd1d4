"""The result of `simmim bench kernels` for a person: tables in the terminal, JSON and a plot on disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.table import Table

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

DIRECTIONS = ("forward", "backward")
TITLES = {"window_attention": "Window attention", "norm": "Norm with residual sum", "masked_loss": "Masked loss"}
COLOURS = ("#1f5fa8", "#d97706", "#3f8f5f", "#b45390", "#7aa6d8", "#8a6d3b", "#6b6b6b", "#c9a227")


def kernel_tables(result: dict[str, Any]) -> list[Table]:
    """A table for each op, with one line per layer and implementation: time, bytes per second, times the floor, error."""
    return [_table(op, rows, result) for op, rows in _by_op(result).items()]


def _table(op: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> Table:
    environment, ceilings = result["environment"], result["ceilings"]
    table = Table(
        title=f"{TITLES[op]}, {environment['dtype']}, {environment['device']}: copy {ceilings['copy'] / 1e9:,.0f} GB/s,"
        f" matrix product {ceilings['product'] / 1e12:,.2f} TFLOP/s",
        title_justify="left",
        box=None,
        header_style="dim",
    )
    for column in ("layer", "implementation"):
        table.add_column(column, no_wrap=True)
    for direction in DIRECTIONS:
        for column in (f"{direction}, ms", "GB/s", "x floor", "error"):
            table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    previous = None
    for row in rows:
        cells = [cell for direction in DIRECTIONS for cell in _cells(row.get(direction))]
        table.add_row("" if row["layer"] == previous else row["layer"], row["implementation"], *cells)
        previous = row["layer"]
    return table


def _cells(one: dict[str, Any] | None) -> list[str]:
    if one is None:
        return ["-"] * 4
    speed = one["bytes"] / one["seconds"] / 1e9
    return [f"{1e3 * one['seconds']:,.3f}", f"{speed:,.1f}", f"{one['times_floor']:.2f}", f"{one['difference']:.0e}"]


def left_out_lines(result: dict[str, Any]) -> Iterator[str]:
    """What is not in the tables, and why."""
    for op, reasons in result["left_out"].items():
        if reasons:
            yield f"{TITLES[op]}, not measured: " + "; ".join(f"{name} ({reason})" for name, reason in reasons.items())


def write_results(result: dict[str, Any], out: Path) -> list[Path]:
    """kernels.json and kernels.png in OUT; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "kernels.json", out / "kernels.png"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    draw(result).savefig(paths[1], dpi=120)
    return paths


def draw(result: dict[str, Any]) -> Figure:
    """Times over the floor, a row of axes for each op: bars begin at 1, what the device allows, and end with milliseconds."""
    ops = _by_op(result)
    names = list(dict.fromkeys(row["implementation"] for row in result["rows"]))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    heights = [len(rows) + 1.2 * len({row["layer"] for row in rows}) for rows in ops.values()]
    figure = Figure(figsize=(12, 2.2 + 0.17 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(ops), 2, sharey="row", squeeze=False, gridspec_kw={"height_ratios": heights})
    for (op, rows), pair in zip(ops.items(), grid, strict=True):
        for direction, axes in zip(DIRECTIONS, pair, strict=True):
            _draw_bars(axes, rows, direction, colours)
            axes.set_title(f"{TITLES[op]}, {direction}", fontsize=10, loc="left")
        _label_layers(pair[0], rows)
    for axes in grid[-1]:
        axes.set_xlabel("time / floor of this device; 1 is the floor (log scale)")
    handles = [matplotlib.patches.Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(names), 6), frameon=False)
    figure.supxlabel(_caption(result), fontsize=8)
    return figure


def _by_op(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    ops: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        ops.setdefault(row["op"], []).append(row)
    return ops


def _places(rows: list[dict[str, Any]]) -> list[float]:
    """Heights of the bars: one unit a bar, and room between layers."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    return [number + 1.2 * layers.index(row["layer"]) for number, row in enumerate(rows)]


def _draw_bars(axes: Axes, rows: list[dict[str, Any]], direction: str, colours: dict[str, str]) -> None:
    axes.set_xscale("log")
    for place, row in zip(_places(rows), rows, strict=True):
        one = row.get(direction)
        if one is None:
            axes.annotate(" none here", (1.0, place), va="center", fontsize=7, color="#6b6b6b")
            continue
        times = one["times_floor"]
        axes.barh(place, times - 1, left=1.0, height=0.85, color=colours[row["implementation"]])
        axes.annotate(f" {1e3 * one['seconds']:,.3g} ms", (max(times, 1.0), place), va="center", fontsize=7)
    shown = [row[direction]["times_floor"] for row in rows if direction in row]
    axes.set_xlim(min(0.5, *shown) * 0.9, max(2.0, *shown) * 2.5)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _label_layers(axes: Axes, rows: list[dict[str, Any]]) -> None:
    middles: dict[str, list[float]] = {}
    for place, row in zip(_places(rows), rows, strict=True):
        middles.setdefault(row["layer"], []).append(place)
    axes.set_yticks([float(np.mean(places)) for places in middles.values()], list(middles))
    axes.invert_yaxis()


def _caption(result: dict[str, Any]) -> str:
    environment, ceilings = result["environment"], result["ceilings"]
    threads = f", threads: {environment['threads']}" if environment["cuda"] is None else ""
    return (
        f"{environment['device']}{threads}, {environment['dtype']}, torch {environment['torch']}, {environment['date']}."
        f" Floor: copy {ceilings['copy'] / 1e9:,.0f} GB/s, matrix product {ceilings['product'] / 1e12:,.2f} TFLOP/s;"
        " what fits a cache can be below it."
    )
