"""Curves as SVG elements that can stand inside an HTML page: no file, no address from elsewhere, text stays text.

A curve of any length is thinned to `MAX_POINTS` bins (mean, with the range as a pale band), so a page stays small.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

MAX_POINTS = 400
SMOOTHING_SHARE = 0.015  # reach of the moving average to each side, as a share of the curve
INK, FAINT, GRID = "#3b424d", "#8a93a0", "#e8ebef"
BLUE, ORANGE, GREEN = "#2f6fdf", "#d9680f", "#2f9e63"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "simmim_scale",  # the same curves give the same bytes
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class Curve:
    """Values over steps; NaN where there is none.

    Args:
        steps: increasing.
        values: one per step.
        label: what the legend calls it; "" leaves it out.
        colour: of the line.
        marked: few points, each marked (validations).
        smoothed: draw a moving average, and the values themselves pale behind it.
    """

    steps: Sequence[float]
    values: Sequence[float]
    label: str = ""
    colour: str = BLUE
    marked: bool = False
    smoothed: bool = False


def thin(
    steps: np.ndarray, values: np.ndarray, points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """At most `points` bins of neighbours: (step, mean, lowest, highest) of each; NaN values are left out first."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= points:
        return steps, values, values, values
    starts = np.linspace(0, len(values), points, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(values)))
    means = [np.add.reduceat(array, starts) / counts for array in (steps, values)]
    return means[0], means[1], np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average, so that it does not lag; at the ends it uses the neighbours there are."""
    reach = round(len(values) * SMOOTHING_SHARE)
    if reach < 1:
        return values
    weights = 1.0 - np.abs(np.arange(-reach, reach + 1)) / (reach + 1)
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


def _draw(axes: Axes, curve: Curve) -> None:
    steps, mean, low, high = thin(np.asarray(curve.steps, float), np.asarray(curve.values, float))
    if curve.marked:
        axes.plot(steps, mean, color=curve.colour, label=curve.label, linewidth=1.8, marker="o", markersize=4, zorder=4)
        return
    if not curve.smoothed:
        axes.fill_between(steps, low, high, color=curve.colour, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=curve.colour, label=curve.label, linewidth=1.6)
        return
    axes.fill_between(steps, low, high, color=curve.colour, alpha=0.10, linewidth=0)
    axes.plot(steps, mean, color=curve.colour, alpha=0.28, linewidth=0.9)
    axes.plot(steps, smooth(mean), color=curve.colour, label=curve.label, linewidth=1.8)


def _tick(value: float, _position: int) -> str:
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _percent_tick(value: float, _position: int) -> str:
    return f"{100 * value:.3g}%"


def _set_limits(axes: Axes, curves: Sequence[Curve], reach: float, *, from_zero: bool) -> None:
    """Show everything but a few outliers, which would press the rest flat."""
    values = np.concatenate([np.asarray(curve.values, float) for curve in curves])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    marked = (np.nanmax([0.0, *curve.values]) for curve in curves if curve.marked)
    low, high = values.min(), max(np.quantile(values, 0.99), reach, *marked)
    low = min(low, 0 if from_zero else low)
    margin = 0.07 * (high - low) or abs(high) * 0.1 or 1.0
    axes.set_ylim(low if from_zero else low - margin, high + margin)


def draw_chart(
    curves: Sequence[Curve],
    *,
    level: tuple[float, str] | None = None,
    size: tuple[float, float] = (5.0, 2.5),
    percent: bool = False,
    from_zero: bool = False,
    at_least: float = 0.0,
) -> str:
    """An <svg> element, as wide as what holds it.

    Args:
        curves: at least one.
        level: (value, label) of a dashed horizontal line.
        size: inches; only the proportion and the relative size of letters matter.
        percent: values are shares.
        from_zero: the axis begins at 0.
        at_least: the axis reaches at least this, so that small noise looks small.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            _draw(axes, curve)
        if level:
            axes.axhline(level[0], color=INK, linewidth=1.2, linestyle=(0, (5, 4)), label=level[1])
        _set_limits(axes, curves, max(at_least, level[0] if level else 0.0), from_zero=from_zero)
        _dress(axes, percent=percent)
        if level or len(curves) > 1:
            # Many curves would lie under their legend: it goes above them.
            above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4} if len(curves) > 3 else {"loc": "upper right"}
            axes.legend(frameon=False, labelcolor=INK, handlelength=1.6, borderaxespad=0.2, **above)
        return svg_element(figure)


def _dress(axes: Axes, *, percent: bool) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5)
    axes.margins(x=0.01)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent_tick if percent else _tick))


def svg_element(figure: Figure) -> str:
    """The figure as an <svg> element for an HTML page, as wide as what holds it. Draw it under `STYLE`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML an <svg> needs no name spaces, and without width and height it is as wide as its frame.
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    return re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1), count=1)
