"""Window partition and cyclic shift as index arithmetic: which window and head a Triton program works on, where its tokens lie.

Nothing is partitioned or rolled in memory: the projection stays a matrix of one row a token, (b * h * w, 3c), its image's tokens
row-major. Every kernel of window attention begins with `split_program` and `locate_window`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

MASKED_LOGIT = tl.constexpr(-100.0 * 1.4426950408889634)  # regions.MASKED_LOGIT, in units of log2


class Window(NamedTuple):
    """One head of one window. Offsets are in elements; those of matrices are of the image's first token.

    Attributes:
        qkv: offset of the head's q in the projection and its gradient; k and v lie c and 2c channels further.
        out: offset of the head in the output and its gradient.
        statistics: offset of the window's first query in what is kept of each (log-sum-exp, delta).
        row, column: place in the image's grid of windows.
        last_row, last_column: whether it is the last one there, which a shift fills from both ends of the image.
        height, width, shift_row, shift_column: the image's and the shift, in tokens.
    """

    qkv: Any
    out: Any
    statistics: Any
    row: Any
    column: Any
    last_row: Any
    last_column: Any
    height: Any
    width: Any
    shift_row: Any
    shift_column: Any


@triton.jit
def split_program(heads, TILES: tl.constexpr):
    """(tile, head, window or group of windows) of this program: tiles of one head and window come next to each other."""
    program = tl.program_id(0)
    return program % TILES, program // TILES % heads, program // TILES // heads


@triton.jit
def locate_window(
    index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """The `index`-th window of the batch, for one head."""
    windows = grid_rows * grid_columns
    row = index % windows // grid_columns
    column = index % grid_columns
    # 32 bits hold what is within one image, no more.
    first_token = (index // windows).to(tl.int64) * height * width
    channels = heads * D
    return Window(
        qkv=first_token * 3 * channels + head * D,
        out=first_token * channels + head * D,
        statistics=(index.to(tl.int64) * heads + head) * N,
        row=row,
        column=column,
        last_row=row == grid_rows - 1,
        last_column=column == grid_columns - 1,
        height=height,
        width=width,
        shift_row=shift_row,
        shift_column=shift_column,
    )


@triton.jit
def token_rows(token, window, WH: tl.constexpr, WW: tl.constexpr):
    """Where the tokens of a window lie in its image, as rows of a (h * w, channels) matrix."""
    y = window.row * WH + token // WW + window.shift_row
    x = window.column * WW + token % WW + window.shift_column
    y = tl.where(y >= window.height, y - window.height, y)
    x = tl.where(x >= window.width, x - window.width, x)
    return y * window.width + x


@triton.jit
def token_regions(token, window, WH: tl.constexpr, WW: tl.constexpr):
    """Region of tokens within their window: the last window of a shifted axis holds two, every other one."""
    below = window.last_row & (token // WW >= WH - window.shift_row)
    right = window.last_column & (token % WW >= WW - window.shift_column)
    return 2 * below.to(tl.int32) + right.to(tl.int32)


@triton.jit
def mask_regions(logits, row_region, column_region):
    """Lowers the logits between tokens of different regions."""
    return logits + tl.where(row_region[:, None] == column_region[None, :], 0.0, MASKED_LOGIT)
