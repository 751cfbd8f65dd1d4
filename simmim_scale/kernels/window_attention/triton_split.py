"""The gradient of q and that of the bias by a kernel each, where one kernel for both would need more registers than there are.

Large windows, wide heads and fp32. Letters as in `triton_kernels.py`.
"""

import triton
import triton.language as tl

from simmim_scale.kernels.window_attention.triton_kernels import (
    SIZE_ARGUMENTS,
    load_bias,
    load_tile,
    logit_factor,
    scaled_query,
    store_tile,
    through_unit,
    unit_key,
)
from simmim_scale.kernels.window_attention.triton_partition import (
    locate_window,
    mask_regions,
    split_program,
    token_regions,
    token_rows,
)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def query_only_kernel(
    QKV, BIAS, SCALE, OUT, LSE, GRAD_OUT, DELTA, GRAD_QKV, GRAD_SCALE,
    height, width, grid_rows, grid_columns, shift_row, shift_column, heads,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of q for a tile of `BLOCK` queries of one head of one window, over tiles of `KEYS` keys; delta; logit scale."""
    tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK
    tile, head, index = split_program(heads, tiles)
    window = locate_window(index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N, D)
    channels = heads * D
    qkv = QKV + window.qkv
    m = tile * BLOCK + tl.arange(0, BLOCK)
    query_rows = token_rows(m, window, WH, WW)
    query_region = token_regions(m, window, WH, WW)
    factor = logit_factor(SCALE, head, COSINE, D)
    q = load_tile(qkv, query_rows, m, 3 * channels, N % BLOCK == 0, N, D, DP)
    scaled = scaled_query(q, factor, COSINE)
    grad_out = load_tile(GRAD_OUT + window.out, query_rows, m, channels, N % BLOCK == 0, N, D, DP)
    out = load_tile(OUT + window.out, query_rows, m, channels, N % BLOCK == 0, N, D, DP)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DELTA + window.statistics + m, delta, mask=m < N)
    lse = tl.load(LSE + window.statistics + m, mask=m < N, other=float("inf"))
    gradient = tl.zeros((BLOCK, DP), tl.float32)
    for start in range(0, N, KEYS):
        n = start + tl.arange(0, KEYS)
        rows = token_rows(n, window, WH, WW)
        k = unit_key(load_tile(qkv + channels, rows, n, 3 * channels, N % KEYS == 0, N, D, DP), COSINE)
        v = load_tile(qkv + 2 * channels, rows, n, 3 * channels, N % KEYS == 0, N, D, DP)
        bias = load_bias(BIAS + head * N * N, m, n, N % BLOCK == 0 and N % KEYS == 0, N, False)
        s = tl.dot(scaled, tl.trans(k), bias, input_precision=PRECISION)
        if SHIFTED:
            region = token_regions(n, window, WH, WW)
            s = mask_regions(s, query_region, region)
        p = tl.exp2(s - lse[:, None])
        ds = p * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        gradient = tl.dot(ds.to(k.dtype), k, gradient, input_precision=PRECISION)
    gradient, along = through_unit(gradient * factor, q, COSINE)
    grad_qkv = GRAD_QKV + window.qkv
    store_tile(grad_qkv, query_rows, m, 3 * channels, gradient, N % BLOCK == 0, N, D, DP)
    if COSINE:
        own = index.to(tl.int64) * heads + head
        tl.store(GRAD_SCALE + own * tiles + tile, tl.sum(tl.where(m < N, along, 0.0), 0))


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def bias_gradient_kernel(
    QKV, BIAS, SCALE, LSE, GRAD_OUT, DELTA, GRAD_BIAS,
    height, width, grid_rows, grid_columns, shift_row, shift_column, heads, total_windows, groups,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias for a tile of pairs of one head, over every `groups`-th window; needs delta."""
    query_tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK
    key_tiles: tl.constexpr = (N + KEYS - 1) // KEYS
    pair, head, group = split_program(heads, query_tiles * key_tiles)
    m = pair % query_tiles * BLOCK + tl.arange(0, BLOCK)
    n = pair // query_tiles * KEYS + tl.arange(0, KEYS)
    channels = heads * D
    factor = logit_factor(SCALE, head, COSINE, D)
    bias_sum = tl.zeros((BLOCK, KEYS), tl.float32)
    for number in range((total_windows - group + groups - 1) // groups):
        index = group + number * groups
        window = locate_window(index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N, D)
        qkv = QKV + window.qkv
        query_rows = token_rows(m, window, WH, WW)
        rows = token_rows(n, window, WH, WW)
        q = scaled_query(load_tile(qkv, query_rows, m, 3 * channels, N % BLOCK == 0, N, D, DP), factor, COSINE)
        k = unit_key(load_tile(qkv + channels, rows, n, 3 * channels, N % KEYS == 0, N, D, DP), COSINE)
        bias = load_bias(BIAS + head * N * N, m, n, N % BLOCK == 0 and N % KEYS == 0, N, False)
        s = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)
        if SHIFTED:
            query_region = token_regions(m, window, WH, WW)
            region = token_regions(n, window, WH, WW)
            s = mask_regions(s, query_region, region)
        lse = tl.load(LSE + window.statistics + m, mask=m < N, other=float("inf"))
        delta = tl.load(DELTA + window.statistics + m, mask=m < N, other=0.0)
        grad_out = load_tile(GRAD_OUT + window.out, query_rows, m, channels, N % BLOCK == 0, N, D, DP)
        v = load_tile(qkv + 2 * channels, rows, n, 3 * channels, N % KEYS == 0, N, D, DP)
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        bias_sum += tl.exp2(s - lse[:, None]) * (grad_weights - delta[:, None])
    pointers = GRAD_BIAS + (group * heads + head).to(tl.int64) * N * N + m[:, None] * N + n[None, :]
    tl.store(pointers, bias_sum, mask=(m[:, None] < N) & (n[None, :] < N))
