"""`simmim masks`: what a masking looks like on one's own picture, its AvgDist, and which maskings have a wanted AvgDist."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from simmim_scale.config.load import validate
from simmim_scale.config.schema import Config, MaskConfig
from simmim_scale.config.yaml_source import Source
from simmim_scale.data.mask_distance import (
    GOOD_DISTANCE,
    Distance,
    Solution,
    average_distance,
    cells_of,
    figure_settings,
    mask_grid,
    setting_distance,
    solve_ratio,
)
from simmim_scale.data.masks import SAMPLERS, num_hidden, sample_mask
from simmim_scale.data.random import Stream, sample_rng

SHOWN = 5  # masks of the setting that a preview shows
AXIS_SAMPLES = 64  # masks per setting of figure 1's axis


@dataclass(frozen=True)
class MaskReport:
    """What is known of one setting: how many cells it hides, and its AvgDist."""

    setting: MaskConfig
    image_size: tuple[int, int]
    hidden: int
    cells: int
    distance: Distance

    def as_json(self) -> dict[str, Any]:
        return {
            **self.setting.model_dump(mode="json"),
            "image_size": list(self.image_size),
            "hidden_cells": self.hidden,
            "mask_cells": self.cells,
            "avg_dist": round(self.distance.mean, 3),
            "avg_dist_spread": round(self.distance.spread, 3),
        }


def explore(
    tree: dict[str, Any],
    *,
    photo: Path | None,
    out: Path,
    wanted: float | None,
    axis: Path | None,
    console: Console,
    as_json: bool,
) -> None:
    """The command: measures the setting of `tree` (a configuration without its defaults) and does what was asked for besides.

    Raises:
        ValueError: the setting is none, the picture cannot be read, or the wanted AvgDist is not positive.
    """
    config = validate(Source(tree=tree))
    image_size, patch_size = config.model.image_size, config.model.patch_size
    report = measure(config.mask, image_size, seed=config.seed)
    solutions = [] if wanted is None else solve(wanted, image_size, patch_size=patch_size, seed=config.seed)
    print_masks(console, report, solutions, wanted, as_json=as_json)
    written = []
    if photo is not None:
        preview(photo, config, out)
        written.append(out)
    if axis is not None:
        draw_figure(image_size, patch_size, axis, seed=config.seed)
        written.append(axis)
    if not as_json:
        for path in written:
            console.print(str(path))


def measure(setting: MaskConfig, image_size: tuple[int, int], *, seed: int) -> MaskReport:
    """AvgDist of a setting.

    Raises:
        ValueError: the cell does not divide the image, or every cell is hidden.
    """
    grid = mask_grid(image_size, setting.cell)
    distance = setting_distance(image_size=image_size, cell=setting.cell, ratio=setting.ratio, sampler=setting.sampler, seed=seed)
    return MaskReport(setting, image_size, num_hidden(grid, setting.ratio), grid[0] * grid[1], distance)


def solve(wanted: float, image_size: tuple[int, int], *, patch_size: int, seed: int) -> list[Solution]:
    """For every sampler and cell size, the ratio that comes closest to `wanted`; the closest first."""
    cells = [cell for cell in cells_of(image_size, patch_size) if max(mask_grid(image_size, cell)) > 1]
    found = [
        solve_ratio(wanted, image_size=image_size, cell=cell, sampler=name, seed=seed) for name in SAMPLERS for cell in cells
    ]
    return sorted(found, key=lambda solution: abs(solution.distance.mean - wanted))


def preview(photo: Path, config: Config, out: Path) -> None:
    """Writes a PNG: the photograph, and under `SHOWN` masks of the configured setting, each with its AvgDist.

    Raises:
        ValueError: no photograph there, or one that does not decode.
    """
    from simmim_scale.reports.mask_figures import draw_masks
    from simmim_scale.reports.reconstructions import save_picture
    from simmim_scale.tasks.reconstruct import read_photo

    picture = read_photo(photo, config, size=config.model.image_size).permute(1, 2, 0).numpy()
    setting, image_size, seed = config.mask, config.model.image_size, config.seed
    grid = mask_grid(image_size, setting.cell)
    draws = [sample_rng(seed, 0, index, Stream.MASK) for index in range(SHOWN)]
    masks = [sample_mask(rng, grid=grid, ratio=setting.ratio, sampler=setting.sampler) for rng in draws]
    titles = ["original", *(f"AvgDist {average_distance(mask, setting.cell):.1f}" for mask in masks)]
    save_picture(draw_masks(picture, [np.zeros(grid, bool), *masks], titles), out)


def draw_figure(image_size: tuple[int, int], patch_size: int, out: Path, *, seed: int) -> None:
    """Draws figure 1's axis for this image size."""
    from simmim_scale.reports.mask_figures import draw_axis

    rows: dict[str, list[tuple[float, float, float]]] = {}
    for sampler, cell, ratio in figure_settings(image_size, patch_size):
        distance = setting_distance(
            image_size=image_size, cell=cell, ratio=ratio, sampler=sampler, seed=seed, samples=AXIS_SAMPLES
        )
        rows.setdefault(f"{sampler}, {cell} px", []).append((ratio, distance.mean, distance.spread))
    draw_axis(rows, good=GOOD_DISTANCE, path=out)


def print_masks(
    console: Console, report: MaskReport, solutions: Sequence[Solution], wanted: float | None, *, as_json: bool
) -> None:
    """The setting and, where asked for, the settings that have a wanted AvgDist."""
    if as_json:
        found = [{**asdict(solution), "distance": round(solution.distance.mean, 3)} for solution in solutions]
        text = json.dumps(
            {**report.as_json(), **({"wanted": wanted, "solutions": found} if wanted is not None else {})}, indent=2
        )
        console.print(text, markup=False)
        return
    height, width = report.image_size
    setting = report.setting
    console.print(
        f"{setting.sampler}, cells of {setting.cell} px, ratio {setting.ratio:g} at {height}x{width}: {report.hidden} of"
        f" {report.cells} cells hidden, AvgDist {report.distance.mean:.2f} +- {report.distance.spread:.2f} px"
        f" (about {GOOD_DISTANCE:g} is good at 192x192)"
    )
    if wanted is not None:
        console.print(_solutions_table(solutions, wanted))


def _solutions_table(solutions: Sequence[Solution], wanted: float) -> Table:
    table = Table(title=f"Closest to an AvgDist of {wanted:g} px", title_justify="left", box=None, header_style="dim")
    for column in ("sampler", "cell", "ratio", "AvgDist", "spread"):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for found in solutions:
        distance = found.distance
        table.add_row(found.sampler, str(found.cell), f"{found.ratio:g}", f"{distance.mean:.2f}", f"{distance.spread:.2f}")
    return table
