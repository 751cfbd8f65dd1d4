"""The result of `simmim bench step` for a person: tables in the terminal, JSON and a plot on disk."""

import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

from simmim_scale.bench.step_profile import CATEGORIES

matplotlib.use("Agg")
from matplotlib.figure import Figure

GIB = 2**30
COLOURS = ("#1f5fa8", "#d97706", "#7aa6d8", "#b45390", "#3f8f5f", "#8a6d3b", "#c9c9c9")


def step_tables(result: dict[str, Any]) -> list[Table]:
    """Speed and memory, then time by category."""
    environment, facts, ceilings = result["environment"], result["facts"], result["ceilings"]
    speed = Table(
        title=f"{facts['backbone']} {facts['image_size'][0]} px, {facts['parameters'] / 1e6:.1f}M parameters,"
        f" {facts['multiply_adds'] / 1e9:.2f}G multiply-adds, batch {facts['batch']}, {environment['precision']},"
        f" {environment['device']}: copy {ceilings['copy'] / 1e9:,.0f} GB/s, product {ceilings['product'] / 1e12:,.2f} TFLOP/s",
        title_justify="left",
        box=None,
        header_style="dim",
    )
    speed.add_column("", no_wrap=True)
    for column in ("images/s", "ms/step", "of products", "MFU", "of floor", "peak memory", "first loss"):
        speed.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for row in result["rows"]:
        speed.add_row(
            row["side"],
            f"{row['images_per_second']:,.2f}",
            f"{1e3 * row['seconds']:,.1f}",
            _percent(row["share_of_product_ceiling"]),
            _percent(row["mfu"]),
            _percent(row["share_of_floor"]),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f} GiB",
            "not finite" if row["first_loss"] is None else f"{row['first_loss']:.5f}",
        )
    return [speed, _category_table(result), *_ratio_table(result)]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _category_table(result: dict[str, Any]) -> Table:
    table = Table(title="Time by category, ms of a step", title_justify="left", box=None, header_style="dim")
    table.add_column("", no_wrap=True)
    for row in result["rows"]:
        table.add_column(row["side"], justify="right")
        table.add_column("share", justify="right")
    for category in CATEGORIES:
        cells = []
        for row in result["rows"]:
            part = row["seconds_by_category"][category]
            cells += [f"{1e3 * part:,.1f}", f"{part / row['seconds']:.1%}"]
        table.add_row(category, *cells)
    return table


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Ours over the reference: times as many images per second, and the share of its memory; {} without a reference."""
    if len(result["rows"]) < 2:
        return {}
    ours, reference = result["rows"][:2]
    found = {"images_per_second": ours["images_per_second"] / reference["images_per_second"]}
    if ours["peak_bytes"] and reference["peak_bytes"]:
        found["peak_memory"] = ours["peak_bytes"] / reference["peak_bytes"]
    return found


def _ratio_table(result: dict[str, Any]) -> list[Table]:
    found = ratios(result)
    if not found:
        return []
    table = Table(title="Against the published formulation, eager", title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("images/s", f"{found['images_per_second']:.2f} times")
    if "peak_memory" in found:
        table.add_row("peak memory", f"{found['peak_memory']:.2f} of its")
    return [table]


def write_step_results(result: dict[str, Any], out: Path) -> list[Path]:
    """step.json and step.png in OUT; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "step.json", out / "step.png"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    draw_step(result).savefig(paths[1], dpi=120)
    return paths


def draw_step(result: dict[str, Any]) -> Figure:
    """One bar per side, its time by category, with the floor of this device as a line."""
    rows, environment, facts = result["rows"], result["environment"], result["facts"]
    figure = Figure(figsize=(10, 1.9 + 0.75 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        left = 0.0
        for category, colour in zip(CATEGORIES, COLOURS, strict=True):
            width = 1e3 * row["seconds_by_category"][category]
            axes.barh(number, width, left=left, height=0.6, color=colour, label=category if number == 0 else None)
            left += width
        axes.annotate(
            f"{row['images_per_second']:,.1f} images/s", (left, number), xytext=(6, 0), textcoords="offset points", va="center"
        )
    if rows[0]["share_of_floor"] is not None:
        floor = 1e3 * rows[0]["seconds"] * rows[0]["share_of_floor"]
        axes.axvline(floor, color="black", linewidth=1, linestyle="--", label="floor of this device")
    axes.set_yticks(range(len(rows)), [row["side"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22e3 * max(row["seconds"] for row in rows))
    axes.set_xlabel("ms of a step" + (", of processor" if environment["options"]["processor_time"] else ""))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(
        f"{facts['backbone']}, batch {facts['batch']}, {environment['precision']}, {environment['device']}"
        f" ({environment['threads']} threads), torch {environment['versions'].get('torch', '')}, {environment['date']}",
        fontsize=8,
    )
    return figure
