"""Which tokens of a shifted window belong together: index arithmetic shared by the implementations.

Numpy and memoised: the tables depend on sizes only, and numpy constructors are not patched by `deepspeed.zero.Init`.
"""

import functools

import numpy as np

# What published code adds to a logit between two regions of a shifted window.
MASKED_LOGIT = -100.0


def axis_regions(side: int, window: int, shift: int) -> np.ndarray:
    """Region of each rolled coordinate of an axis: 0 before the last window, 1 and 2 in its two parts; all 0 without a shift."""
    if shift == 0:
        return np.zeros(side, dtype=np.int64)
    coordinate = np.arange(side)
    return (coordinate >= side - window).astype(np.int64) + (coordinate >= side - shift)


@functools.lru_cache(maxsize=256)
def window_regions(height: int, width: int, window: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """Region of every token of every window, (windows, n) int64; windows and tokens are row-major. Do not write into it."""
    rows, columns = axis_regions(height, window[0], shift[0]), axis_regions(width, window[1], shift[1])
    grid = 3 * rows[:, None] + columns[None, :]
    blocks = grid.reshape(height // window[0], window[0], width // window[1], window[1]).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks.reshape(-1, window[0] * window[1]))
