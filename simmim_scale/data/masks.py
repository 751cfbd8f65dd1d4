"""Mask samplers: which cells of an image are hidden. Torch-free; a generator is an argument.

Letters: gh, gw = cells along the height and the width of the image.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

from simmim_scale.config.lookup import lookup

# BEiT's block-wise masking (arXiv 2106.08254, algorithm 1): rectangles of at least 16 of 14 x 14
# patches, aspect ratios of .3 to 1/.3.
BLOCK_MIN_SHARE = 16 / 196
BLOCK_ASPECT = (0.3, 1 / 0.3)
BLOCK_ATTEMPTS = 10


def num_hidden(grid: tuple[int, int], ratio: float) -> int:
    """Cells to hide: ceil(cells * ratio). At 192 px, 32-pixel cells and ratio .6 that is 22 of 36."""
    # Rounded first, since 100 * .07 is 7.000000000000001 in floating point.
    return math.ceil(round(grid[0] * grid[1] * ratio, 9))


def sample_mask(
    rng: np.random.Generator, *, grid: tuple[int, int], ratio: float, sampler: str = "random"
) -> Bool[np.ndarray, "gh gw"]:
    """Draws a mask with exactly `num_hidden(grid, ratio)` hidden cells.

    Args:
        rng: Where the randomness comes from.
        grid: Cells along height and width.
        ratio: Share of the cells to hide, strictly between 0 and 1.
        sampler: A name of `SAMPLERS`, or 'module:attribute' of a function that takes (rng, grid, count) as they do.

    Returns:
        True where hidden.

    Raises:
        ValueError: Ratio out of range, empty grid, unknown sampler, or one of one's own that gives something else.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"mask.ratio: expected a share between 0 and 1, both excluded, got {ratio}. The published value is 0.6.")
    if min(grid) < 1:
        raise ValueError(f"grid: expected at least one cell along each side, got {grid}. Choose a smaller mask.cell.")
    if sampler in SAMPLERS:
        return SAMPLERS[sampler](rng, grid, num_hidden(grid, ratio))
    return _checked(_own(sampler)(rng, grid, num_hidden(grid, ratio)), sampler, grid, num_hidden(grid, ratio))


def sample_random(rng: np.random.Generator, grid: tuple[int, int], count: int) -> Bool[np.ndarray, "gh gw"]:
    """Cells drawn without regard to each other: SimMIM's own masking (S figure 1, random)."""
    mask = np.zeros(grid, dtype=bool)
    # Sorting plain draws rather than `permutation`, whose algorithm numpy may change.
    mask.reshape(-1)[np.argsort(rng.random(mask.size), kind="stable")[:count]] = True
    return mask


def sample_block(rng: np.random.Generator, grid: tuple[int, int], count: int) -> Bool[np.ndarray, "gh gw"]:
    """BEiT's block-wise masking, completed to the exact count.

    Rectangles of random area and aspect ratio are hidden as long as they add no more cells than are missing. BEiT stops below the
    count when ten rectangles in a row do not fit; here the hidden region then grows by single cells at its border.
    """
    mask = np.zeros(grid, dtype=bool)
    while (missing := count - int(mask.sum())) > 0 and _add_rectangle(rng, mask, missing):
        pass
    return _grow(rng, mask, count)


def sample_square(rng: np.random.Generator, grid: tuple[int, int], count: int) -> Bool[np.ndarray, "gh gw"]:
    """One square at a random place (S figure 1, square), completed to the exact count by cells at its border."""
    mask = np.zeros(grid, dtype=bool)
    side = min(math.isqrt(count), *grid)
    _hide(rng, mask, side, side)
    return _grow(rng, mask, count)


SAMPLERS: dict[str, Callable[[np.random.Generator, tuple[int, int], int], np.ndarray]] = {
    "random": sample_random,
    "block": sample_block,
    "square": sample_square,
}


@functools.lru_cache(maxsize=8)  # once per process, not per mask
def _own(sampler: str) -> Callable[[np.random.Generator, tuple[int, int], int], np.ndarray]:
    """The function that 'module:attribute' names."""
    if ":" not in sampler:
        raise ValueError(f"mask.sampler: expected one of {', '.join(SAMPLERS)}, or 'module:attribute', got {sampler!r}.")
    return lookup({}, sampler, setting="mask.sampler")


def _checked(mask: np.ndarray, sampler: str, grid: tuple[int, int], count: int) -> np.ndarray:
    """The mask of a function of one's own, if it is what the batch and the loss count on."""
    if not isinstance(mask, np.ndarray) or mask.shape != grid or mask.dtype != bool or int(mask.sum()) != count:
        got = (
            f"{mask.dtype} of shape {mask.shape} with {int(mask.sum())} hidden"
            if isinstance(mask, np.ndarray)
            else type(mask).__name__
        )
        raise ValueError(
            f"mask.sampler: {sampler} must return a bool array of shape {grid} with exactly {count} True, got {got}."
        )
    return mask


def _add_rectangle(rng: np.random.Generator, mask: np.ndarray, missing: int) -> bool:
    """Hides one more rectangle that adds 1 to `missing` cells; False when none of `BLOCK_ATTEMPTS` fits."""
    smallest = min(BLOCK_MIN_SHARE * mask.size, missing)
    low, high = np.log(BLOCK_ASPECT)
    for _ in range(BLOCK_ATTEMPTS):
        area = smallest + rng.random() * (missing - smallest)
        aspect = math.exp(low + rng.random() * (high - low))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (1 <= height <= mask.shape[0] and 1 <= width <= mask.shape[1]):
            continue
        trial = mask.copy()
        _hide(rng, trial, height, width)
        if 0 < int(trial.sum()) - int(mask.sum()) <= missing:
            mask[:] = trial
            return True
    return False


def _hide(rng: np.random.Generator, mask: np.ndarray, height: int, width: int) -> None:
    """Hides a rectangle at a random place, every place equally likely."""
    top = int(rng.random() * (mask.shape[0] - height + 1))
    left = int(rng.random() * (mask.shape[1] - width + 1))
    mask[top : top + height, left : left + width] = True


def _grow(rng: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """Hides visible cells at the border of the hidden region until `count` are hidden.

    Each time a random one of those with the most hidden neighbours, so that sides fill up row by row and it stays compact.
    """
    if not mask.any():
        _hide(rng, mask, 1, 1)
    for _ in range(count - int(mask.sum())):
        padded = np.pad(mask, 1).astype(np.int8)
        neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        neighbours[mask] = -1
        border = np.flatnonzero(neighbours == neighbours.max())
        mask.reshape(-1)[border[int(rng.random() * len(border))]] = True
    return mask
