"""Curves of an evaluation as SVG elements: calibration, confidence, classes, confusion."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from simmim_scale.reports.charts import BLUE, FAINT, GRID, INK, ORANGE, STYLE, svg_element

MOST_CLASSES_IN_A_MATRIX = 40


def draw_reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy over confidence, a bar a bin, against the diagonal of perfect calibration; the bars' shade is their share."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        largest = max((item["samples"] for item in bins), default=1)
        for item in bins:
            axes.bar(
                (item["low"] + item["high"]) / 2,
                item["accuracy"],
                width=0.9 * (item["high"] - item["low"]),
                color=BLUE,
                alpha=0.25 + 0.75 * item["samples"] / largest,
            )
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1.2, linestyle=(0, (5, 4)))
        axes.plot([item["confidence"] for item in bins], [item["accuracy"] for item in bins], "o-", color=ORANGE, markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        return svg_element(figure)


def draw_confidence(right: np.ndarray, wrong: np.ndarray) -> str:
    """How confident right and wrong predictions were. Arguments: confidences, shares."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        axes.hist([right, wrong], bins=np.linspace(0, 1, 21), stacked=True, color=[BLUE, ORANGE], label=["right", "wrong"])
        axes.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(frameon=False, labelcolor=INK)
        return svg_element(figure)


def draw_classes(accuracies: Sequence[float]) -> str:
    """Top-1 accuracy of the classes in percent, worst first, over their rank."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        ordered = np.sort(np.asarray(accuracies, float))
        axes.fill_between(np.arange(len(ordered) + 1), np.append(ordered, ordered[-1:]), step="post", color=BLUE, alpha=0.3)
        axes.step(np.arange(len(ordered) + 1), np.append(ordered, ordered[-1:]), where="post", color=BLUE, linewidth=1.6)
        axes.set(xlim=(0, len(ordered)), ylim=(0, 102), xlabel="classes, worst first", ylabel="top-1")
        axes.yaxis.set_major_formatter(PercentFormatter(100))
        return svg_element(figure)


def draw_confusion(names: Sequence[str], counts: np.ndarray) -> str:
    """Rows: right classes; columns: predictions; colour and number: share of the row in percent. counts: (k, k)."""
    shares = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        side = min(11.0, 2.0 + 0.42 * len(names))
        figure = Figure(figsize=(side, side * 0.86), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        ticks = np.arange(len(names))
        axes.set_xticks(ticks, names, rotation=60, ha="right")
        axes.set_yticks(ticks, names)
        axes.set(xlabel="predicted", ylabel="right class")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if len(names) <= 20:
            for row, column in np.argwhere(shares >= 0.5):
                dark = shares[row, column] > 55
                axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color="white" if dark else INK)
        return svg_element(figure)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5, colors=FAINT)
    return figure, axes
