"""Window geometry and relative positions: which window a stage uses at a size, and the tables its position bias is made from.

Tables are computed by numpy (zero.Init patches torch's constructors) and kept per device in a plain object: constants and no
buffers, so no cast of the model can touch them and no checkpoint holds them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class WindowGeometry:
    """Window and shift, (height, width) in tokens, of one block at one input size."""

    window: tuple[int, int]
    shift: tuple[int, int]


def window_geometry(side: tuple[int, int], limit: tuple[int, int], *, shifted: bool) -> WindowGeometry:
    """Per axis: a side that fits into the window is one unshifted window; else the shift of a shifted block is half a window.

    Args:
        side: tokens per axis of the feature map, before padding.
        limit: window per axis of the stage.
        shifted: whether the block is one of the shifted ones (every second).
    """
    window = tuple(min(tokens, most) for tokens, most in zip(side, limit, strict=True))
    shift = tuple(most // 2 if shifted and tokens > most else 0 for tokens, most in zip(side, limit, strict=True))
    return WindowGeometry(window=(window[0], window[1]), shift=(shift[0], shift[1]))


def stage_sides(image_size: tuple[int, int], patch_size: int, stages: int) -> list[tuple[int, int]]:
    """Tokens per axis at each stage for an image in pixels, with padding to patches and to even sides before merging."""
    height, width = (-(-side // patch_size) for side in image_size)
    sides = [(height, width)]
    for _ in range(stages - 1):
        height, width = -(-height // 2), -(-width // 2)
        sides.append((height, width))
    return sides


def relative_index(window: tuple[int, int], table_window: tuple[int, int]) -> np.ndarray:
    """Row of the (2H-1)(2W-1) table of `table_window` = (H, W) for each pair of tokens of `window`, (n, n) int64.

    Row = query, column = key, as published. A window smaller than the table's uses the table's middle.
    """
    rows = np.arange(window[0])[:, None] - np.arange(window[0])[None, :] + table_window[0] - 1
    columns = np.arange(window[1])[:, None] - np.arange(window[1])[None, :] + table_window[1] - 1
    index = rows[:, None, :, None] * (2 * table_window[1] - 1) + columns[None, :, None, :]
    return np.ascontiguousarray(index.reshape(window[0] * window[1], window[0] * window[1]))


def log_coordinates(window: tuple[int, int], pretrained: tuple[int, int]) -> np.ndarray:
    """Inputs of SwinV2's position-bias MLP, ((2H-1)(2W-1), 2) float32 in the order of `relative_index`.

    sign(c) * log2(1 + |8 c / (w - 1)|) / log2(8) with w the pre-training window (SwinV2 paper, section 3.4). A window of one
    token has only c = 0, where the formula is 0 / 0 and the value is taken as 0.
    """
    axes = []
    for side, reference in zip(window, pretrained, strict=True):
        offsets = np.arange(-(side - 1), side, dtype=np.float32)
        scaled = offsets / np.float32(max(reference - 1, 1)) * np.float32(8.0)
        axes.append(np.sign(scaled) * np.log2(np.abs(scaled) + np.float32(1.0)) / np.float32(np.log2(8)))
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return np.ascontiguousarray(grid.reshape(-1, 2), dtype=np.float32)


class WindowTables:
    """The tables of one backbone on the devices where it has run, made on first use; shared by its blocks.

    torch.compile takes them as constants of its graph.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple, Tensor] = {}

    @torch.compiler.assume_constant_result
    def index(self, window: tuple[int, int], table_window: tuple[int, int], device: torch.device) -> Int[Tensor, "nn"]:
        """`relative_index`, flattened."""
        key = ("index", window, table_window, device)
        if key not in self._tensors:
            self._tensors[key] = _constant(relative_index(window, table_window).reshape(-1), device)
        return self._tensors[key]

    @torch.compiler.assume_constant_result
    def coordinates(self, window: tuple[int, int], pretrained: tuple[int, int], device: torch.device) -> Float[Tensor, "t 2"]:
        """`log_coordinates`, float32."""
        key = ("coordinates", window, pretrained, device)
        if key not in self._tensors:
            self._tensors[key] = _constant(log_coordinates(window, pretrained), device)
        return self._tensors[key]


def _constant(array: np.ndarray, device: torch.device) -> Tensor:
    # A tensor born in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return torch.from_numpy(array).to(device)
