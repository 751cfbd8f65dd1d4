"""Gather of the relative position bias: from one row for each offset to one entry for each pair of tokens, and its gradient.

Rows are looked up by an index that is made once for a device and shared by all blocks: 166 kB at window 12, 2.7 MB at 24. Doing
without it, by strides (unfold), was measured 2 to 12 times slower on a CPU. The gradient is added up by the same index there. On
a GPU that would be by atomics, in another order every time: there the entries of an offset, a diagonal of (query, key), become a
column by skewing the matrix, and columns are summed, which always gives the same digits.
Letters: t offsets, n tokens of a window, y x rows and columns of tokens.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


def gather_bias(
    table: Float[Tensor, "t heads"], index: Int[Tensor, "nn"], *, window: tuple[int, int], table_window: tuple[int, int]
) -> Float[Tensor, "heads n n"]:
    """The table's rows for each pair of tokens.

    Args:
        table: a row for each of the (2H-1)(2W-1) offsets of `table_window` = (H, W).
        index: `windows.relative_index` of the two windows, flattened.
        window: (height, width) in tokens; not larger than `table_window`, of whose table it uses the middle.
    """
    return _Gather.apply(table, index, window, table_window)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, window: tuple[int, int], table_window: tuple[int, int]) -> Tensor:
        ctx.windows = window, table_window
        ctx.save_for_backward(index)
        tokens = window[0] * window[1]
        return table.index_select(0, index).t().reshape(table.shape[1], tokens, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if gradient.device.type == "cpu":
            (index,) = ctx.saved_tensors
            return added_by_index(gradient, index, ctx.windows[1]), None, None, None
        return added_by_diagonals(gradient, *ctx.windows), None, None, None


def added_by_index(
    gradient: Float[Tensor, "heads n n"], index: Int[Tensor, "nn"], table_window: tuple[int, int]
) -> Float[Tensor, "t heads"]:
    """Gradient of the table; the order of additions is fixed on a CPU only."""
    offsets = (2 * table_window[0] - 1) * (2 * table_window[1] - 1)
    return gradient.new_zeros(offsets, gradient.shape[0]).index_add_(0, index, gradient.flatten(1).t())


def added_by_diagonals(
    gradient: Float[Tensor, "heads n n"], window: tuple[int, int], table_window: tuple[int, int]
) -> Float[Tensor, "t heads"]:
    """Gradient of the table, by sums in a fixed order on any device."""
    rows, columns = table_window[0] - window[0], table_window[1] - window[1]
    return pad(offset_sums(gradient, window), (columns, columns, rows, rows)).flatten(1).t()


def offset_sums(pairs: Float[Tensor, "heads n n"], window: tuple[int, int]) -> Float[Tensor, "heads y2 x2"]:
    """Sum over all pairs of tokens with the same offset, (heads, 2H-1, 2W-1)."""
    height, width = window
    grid = pairs.reshape(-1, height, width, height, width)  # heads, query's y x, key's y x
    by_rows = _sum_diagonals(grid.permute(0, 2, 4, 1, 3))  # heads, query's x, key's x, offset in y
    return _sum_diagonals(by_rows.permute(0, 3, 1, 2))


def _sum_diagonals(matrices: Tensor) -> Tensor:
    """(..., i, j) -> (..., 2n-1): place d holds the sum of what has i - j = d - (n - 1)."""
    size = matrices.shape[-1]
    # Rows of 2n, read again as rows of 2n - 1: each row starts one place further to the left than the one above it.
    rows = pad(matrices.flip(-1), (0, size)).flatten(-2)[..., : size * (2 * size - 1)]
    return rows.unflatten(-1, (size, 2 * size - 1)).sum(-2)
