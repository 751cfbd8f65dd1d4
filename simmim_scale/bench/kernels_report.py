"""The result of `simmim bench kernels` for a person: a table in the terminal, JSON and a plot on disk."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.table import Table

matplotlib.use("Agg")
from matplotlib.figure import Figure

DIRECTIONS = ("forward", "backward")


def kernel_table(result: dict[str, Any]) -> Table:
    """One line per case and implementation: time, bytes per second, times the floor."""
    environment, ceilings = result["environment"], result["ceilings"]
    table = Table(
        title=f"Window attention, {environment['dtype']}, {environment['device']}: copy {ceilings['copy'] / 1e9:,.0f} GB/s,"
        f" matrix product {ceilings['product'] / 1e12:,.2f} TFLOP/s",
        title_justify="left",
        box=None,
        header_style="dim",
    )
    table.add_column("model/stage", no_wrap=True)
    table.add_column("implementation", no_wrap=True)
    for direction in DIRECTIONS:
        for column in (f"{direction}, ms", "GB/s", "x floor"):
            table.add_column(column, justify="right")
    table.add_column("error", justify="right")
    previous = None
    for row in result["rows"]:
        layer = layer_name(row)
        cells = []
        for direction in DIRECTIONS:
            one = row[direction]
            speed = one["bytes"] / one["seconds"] / 1e9
            cells += [f"{1e3 * one['seconds']:,.3f}", f"{speed:,.1f}", f"{one['times_floor']:.2f}"]
        table.add_row("" if layer == previous else layer, row["implementation"], *cells, f"{row['difference']:.0e}")
        previous = layer
    return table


def layer_name(row: dict[str, Any]) -> str:
    """Model / stage, batch and window of a row: swinv2_h/3 b128 w12."""
    return f"{row['model']}/{row['stage']} b{row['batch']} w{row['window']}"


def write_results(result: dict[str, Any], out: Path) -> list[Path]:
    """kernels.json and kernels.png in OUT; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "kernels.json", out / "kernels.png"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    draw(result).savefig(paths[1], dpi=120)
    return paths


def draw(result: dict[str, Any]) -> Figure:
    """Times over the floor, forward and backward, one group of bars per layer: 1 is what the device allows."""
    layers = list(dict.fromkeys(layer_name(row) for row in result["rows"]))
    names = list(dict.fromkeys(row["implementation"] for row in result["rows"]))
    figure = Figure(figsize=(11, 1.6 + 0.22 * len(layers) * (len(names) + 1)), layout="constrained")
    for number, (direction, axes) in enumerate(zip(DIRECTIONS, figure.subplots(1, 2, sharey=True), strict=True)):
        for offset, name in enumerate(names):
            rows = [row for row in result["rows"] if row["implementation"] == name]
            places = [layers.index(layer_name(row)) + 0.8 * (offset + 0.5) / len(names) - 0.4 for row in rows]
            lengths = [row[direction]["times_floor"] for row in rows]
            axes.barh(places, lengths, height=0.72 / len(names), label=name)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel(f"{direction}: time / floor of this device (1 = the floor)")
        axes.spines[["top", "right"]].set_visible(False)
        if number == 0:
            axes.set_yticks(np.arange(len(layers)), layers)
            axes.invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    environment = result["environment"]
    figure.supxlabel(
        f"{environment['device']}, {environment['dtype']}, torch {environment['torch']}, {environment['date']}", fontsize=8
    )
    return figure
