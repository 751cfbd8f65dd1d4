"""Pictures of masks: a setting on somebody's own photograph, and where settings lie on figure 1's axis."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from simmim_scale.reports.atomic_write import replace_file
from simmim_scale.reports.reconstructions import draw_reconstructions, hide

INK, GRID, GOOD = "#3c4048", "#d8d8dc", "#c8553d"


def draw_masks(picture: np.ndarray, masks: Sequence[np.ndarray], titles: Sequence[str]) -> Image.Image:
    """A photograph under several masks, each with a title.

    Args:
        picture: (h, w, 3) uint8.
        masks: (gh, gw) bool, True = hidden; cells divide the picture.
        titles: one per mask.
    """
    return draw_reconstructions([[hide(picture, mask) for mask in masks]], titles, groups=1)


def draw_axis(points: Mapping[str, Sequence[tuple[float, float, float]]], *, good: float, path: Path) -> None:
    """Figure 1's horizontal axis: a row per kind of mask, a point per ratio at its AvgDist, a bar for its spread.

    Args:
        points: row -> (ratio, mean, spread) of each setting, pixels.
        good: AvgDist that is marked.
    """
    figure = Figure(figsize=(8, 0.6 + 0.55 * len(points)), layout="constrained")
    axes = figure.subplots()
    for row, (name, settings) in enumerate(points.items()):
        ratios, means, spreads = (np.array(column) for column in zip(*settings, strict=True))
        axes.errorbar(means, np.full(len(means), row), xerr=spreads, fmt="o", color=INK, ecolor=GRID, markersize=4, elinewidth=3)
        drawn = -np.inf
        for ratio, mean in zip(ratios, means, strict=True):
            if mean - drawn > 0.02 * _longest(points):  # labels that would lie on each other are left out
                axes.annotate(f"{ratio:.1f}"[1:], (mean, row), (0, 6), textcoords="offset points", ha="center", fontsize=7)
                drawn = mean
        axes.axhline(row, color=GRID, linewidth=0.5, zorder=0)
        axes.text(-0.01, row, name, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=9)
    axes.axvline(good, color=GOOD, linewidth=1, zorder=0)
    axes.text(good, -1.05, f"{good:g}", color=GOOD, ha="center", fontsize=9)
    axes.set(
        yticks=[], ylim=(len(points) - 0.4, -1.0), xlabel="AvgDist, pixels (numbers: ratio; bars: standard deviation over masks)"
    )
    axes.set_xlim(left=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def _longest(points: Mapping[str, Sequence[tuple[float, float, float]]]) -> float:
    return max(mean for settings in points.values() for _, mean, _ in settings)
