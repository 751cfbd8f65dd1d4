"""Pictures of the statistics: class balance, sizes, bytes, and a sheet of samples."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from data_tools.stats import Stats

_MOST_NAMED = 30  # classes that get a bar with a name; more become a curve
_CELL, _CAPTION, _GAP = 128, 16, 8  # pixels of the sample sheet
_INK, _BAR = "#333333", "#3b6ea8"


def draw_stats(stats: Stats, path: Path) -> None:
    """Write a PNG with class balance, image sizes, sides and bytes."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    balance, sizes, ratio, weight = figure.subplots(2, 2).ravel()
    _draw_balance(balance, stats)
    _draw_sizes(sizes, stats)
    _draw_ratio(ratio, stats)
    weight.hist(stats.image_bytes / 1000, bins=50, color=_BAR)
    weight.set(title="Bytes an image", xlabel="kB", ylabel="images")
    for axes in (balance, sizes, ratio, weight):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    figure.savefig(path, dpi=110)


def draw_sheet(pictures: list[tuple[Image.Image, str]], path: Path, *, columns: int = 8) -> None:
    """Write a PNG with small pictures and their captions."""
    rows = -(-len(pictures) // columns) or 1
    width, height = columns * (_CELL + _GAP) + _GAP, rows * (_CELL + _CAPTION + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(pictures):
        x = _GAP + number % columns * (_CELL + _GAP)
        y = _GAP + number // columns * (_CELL + _CAPTION + _GAP)
        sheet.paste(picture, (x + (_CELL - picture.width) // 2, y + (_CELL - picture.height) // 2))
        shown = caption if len(caption) <= 20 else "..." + caption[-17:]
        draw.text((x + _CELL // 2, y + _CELL + 2), shown, fill=_INK, anchor="ma", font_size=11)
    sheet.save(path)


def _draw_balance(axes, stats: Stats) -> None:
    counts = stats.class_counts
    if stats.classes is None or not counts.sum():
        axes.text(0.5, 0.5, "no labels", ha="center", va="center", color=_INK)
        axes.set(title="Classes", xticks=[], yticks=[])
        return
    order = np.argsort(-counts, kind="stable")
    if len(order) <= _MOST_NAMED:
        axes.barh([stats.classes[label] for label in order][::-1], counts[order][::-1], color=_BAR)
        axes.set(title=f"{len(order)} classes", xlabel="images")
        return
    axes.fill_between(np.arange(len(order)), counts[order], step="mid", color=_BAR)
    axes.set(title=f"{len(order):,} classes, largest first", xlabel="rank of the class", ylabel="images")
    axes.set_ylim(bottom=0)


def _draw_sizes(axes, stats: Stats) -> None:
    sizes = stats.pictures.sizes
    axes.set(title=f"Sizes of {len(sizes):,} images", xlabel="width, pixels", ylabel="height, pixels")
    if len(sizes) > 2000:
        axes.hexbin(sizes[:, 0], sizes[:, 1], gridsize=50, bins="log", cmap="Blues", mincnt=1)
    else:
        axes.scatter(sizes[:, 0], sizes[:, 1], s=8, alpha=0.4, color=_BAR)


def _draw_ratio(axes, stats: Stats) -> None:
    sizes = stats.pictures.sizes
    if len(sizes):
        axes.hist(sizes.min(axis=1), bins=50, color=_BAR)
    axes.set(title="Shorter side", xlabel="pixels", ylabel="images")
