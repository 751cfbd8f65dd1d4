"""AvgDist: the mean Euclidean distance of hidden pixels to the nearest visible one, of a mask and of a masking. Torch-free.

The supplement's figure 1 finds it a good sign of how well a masking works: about 15 pixels at 192 x 192 is good.
Letters: gh gw cells of the mask along height and width.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy.ndimage import distance_transform_edt

from simmim_scale.data.masks import num_hidden, sample_mask
from simmim_scale.data.random import Stream, sample_rng

GOOD_DISTANCE = 15.0  # pixels, S figure 1
SAMPLES = 1000  # masks that a setting's distance is estimated from: its standard error is then a thirtieth of the spread


@dataclass(frozen=True)
class Distance:
    """AvgDist of a masking setting, in pixels: mean and standard deviation over masks."""

    mean: float
    spread: float


@dataclass(frozen=True)
class Solution:
    """What comes closest to a wanted AvgDist with one sampler and cell size: the share of hidden cells, and its AvgDist."""

    sampler: str
    cell: int
    ratio: float
    distance: Distance


def average_distance(mask: Bool[np.ndarray, "gh gw"], cell: int) -> float:
    """AvgDist of one mask in pixels, by the exact Euclidean distance transform of its picture.

    Args:
        mask: True where hidden.
        cell: side of a cell in pixels; centres of pixels are what distances are measured between.

    Raises:
        ValueError: nothing is hidden, or nothing is visible.
    """
    if not mask.any() or mask.all():
        what = "hides every cell" if mask.all() else "hides no cell"
        raise ValueError(f"mask: AvgDist needs hidden and visible cells, got a mask that {what}. Change mask.ratio or mask.cell.")
    hidden = mask.repeat(cell, axis=0).repeat(cell, axis=1)
    return float(distance_transform_edt(hidden)[hidden].mean())


@functools.lru_cache(maxsize=64)  # a pure function that a run asks at its start and at every validation
def setting_distance(
    *, image_size: tuple[int, int], cell: int, ratio: float, sampler: str = "random", seed: int = 0, samples: int = SAMPLES
) -> Distance:
    """AvgDist of a setting, from `samples` masks of the training stream of `seed`.

    Raises:
        ValueError: the cell does not divide the image, or the setting hides every cell.
    """
    grid = mask_grid(image_size, cell)
    masks = (
        sample_mask(sample_rng(seed, 0, index, Stream.MASK), grid=grid, ratio=ratio, sampler=sampler) for index in range(samples)
    )
    distances = [average_distance(mask, cell) for mask in masks]
    return Distance(float(np.mean(distances)), float(np.std(distances)))


def mask_grid(image_size: tuple[int, int], cell: int) -> tuple[int, int]:
    """Cells along height and width.

    Raises:
        ValueError: the cell does not divide the image.
    """
    height, width = image_size
    if cell < 1 or height % cell or width % cell:
        raise ValueError(
            f"mask.cell: must divide the image, got a cell of {cell} for {height}x{width} pixels."
            f" Choose a common divisor of {height} and {width}."
        )
    return height // cell, width // cell


def solve_ratio(
    wanted: float, *, image_size: tuple[int, int], cell: int, sampler: str = "random", seed: int = 0, samples: int = 64
) -> Solution:
    """The ratio whose AvgDist comes closest to `wanted` pixels with this sampler and cell.

    AvgDist grows with every further cell that is hidden, so the number of hidden cells is found by bisection.

    Raises:
        ValueError: `wanted` is not positive, the cell does not divide the image or leaves a single cell.
    """
    if not wanted > 0:
        raise ValueError(f"AvgDist: a positive number of pixels, got {wanted}. About {GOOD_DISTANCE:g} is good at 192 x 192.")
    rows, columns = mask_grid(image_size, cell)
    if rows * columns < 2:
        raise ValueError(f"mask.cell: at least two cells, got one of {cell} for {image_size[0]}x{image_size[1]} pixels.")

    def at(count: int) -> Distance:
        # A little less than the whole count's share, which `num_hidden` rounds up to it.
        ratio = (count - 0.5) / (rows * columns)
        return setting_distance(image_size=image_size, cell=cell, ratio=ratio, sampler=sampler, seed=seed, samples=samples)

    low, high = 1, rows * columns - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).mean < wanted else (low, middle)
    distances = {count: at(count) for count in {low, high}}
    count = min(distances, key=lambda count: abs(distances[count].mean - wanted))
    return Solution(sampler, cell, _ratio_of(count, rows * columns), distances[count])


def cells_of(image_size: tuple[int, int], patch_size: int) -> list[int]:
    """Cell sizes of figure 1 (4 to 64 pixels) that this image and patch allow."""
    height, width = image_size
    return [cell for cell in (4, 8, 16, 32, 64) if not (height % cell or width % cell or cell % patch_size)]


def figure_settings(image_size: tuple[int, int], patch_size: int = 4) -> Iterator[tuple[str, int, float]]:
    """(sampler, cell, ratio) of figure 1: random cells of every size, block-wise and square, ratios .1 to .9."""
    cells = cells_of(image_size, patch_size)
    shaped = 32 if 32 in cells else cells[-1]  # block and square are made of the default cell
    for sampler, sizes in (("random", cells), ("block", [shaped]), ("square", [shaped])):
        for cell in sizes:
            rows, columns = mask_grid(image_size, cell)
            for ratio in figure_ratios():
                if num_hidden((rows, columns), ratio) < rows * columns:
                    yield sampler, cell, ratio


def figure_ratios() -> Sequence[float]:
    """.1 to .9."""
    return tuple(tenth / 10 for tenth in range(1, 10))


def _ratio_of(count: int, cells: int) -> float:
    """A ratio of few digits that hides exactly `count` of `cells`."""
    for digits in range(1, 8):
        for ratio in (round(count / cells, digits), round(count / cells - 0.5 * 10**-digits, digits)):
            if 0 < ratio < 1 and num_hidden((1, cells), ratio) == count:
                return ratio
    return (count - 0.5) / cells
