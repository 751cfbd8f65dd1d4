"""Forward, and the kernels of `triton_split.py`, for heads too wide to be held whole: they take `PART` channels at a time.

For fp32 with more than 64 channels: a product in full precision holds every operand twice (what TensorFloat-32 keeps, and what it
rounds away), and two operands of 128 channels alone would fill the registers. Forward serves fp32 windows of more than 256 tokens
too, whose logits it need not hold all at once. Letters as in `triton_kernels.py`.
"""

import triton
import triton.language as tl

from simmim_scale.kernels.window_attention.triton_kernels import (
    LOG2E,
    NORM_EPS,
    SIZE_ARGUMENTS,
    inverse_norm,
    load_bias,
    logit_factor,
    zeros,
)
from simmim_scale.kernels.window_attention.triton_partition import (
    locate_window,
    mask_regions,
    split_program,
    token_regions,
    token_rows,
)


@triton.jit
def load_part(base, rows, token, first, stride, N: tl.constexpr, D: tl.constexpr, PART: tl.constexpr):
    """(tokens, PART) fp32, channels of a head from `first` on; zero beyond the window and the head dim."""
    d = first + tl.arange(0, PART)
    inside = (token[:, None] < N) & (d[None, :] < D)
    return tl.load(base + rows[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sum_products(a, b, rows, token, a_stride, b_stride, N: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, SIZE: tl.constexpr):
    """Inner products of the rows of two matrices, (SIZE,)."""
    total = tl.zeros((SIZE,), tl.float32)
    for first in tl.range(0, D, PART, loop_unroll_factor=1, disable_licm=True):
        left = load_part(a, rows, token, first, a_stride, N, D, PART)
        total += tl.sum(left * load_part(b, rows, token, first, b_stride, N, D, PART), 1)
    return total


@triton.jit
def unit_factor(square, COSINE: tl.constexpr):
    """What vectors are multiplied by before their product: 1 / length (V1: 1)."""
    factor = square * 0.0 + 1.0
    if COSINE:
        factor = inverse_norm(square)
    return factor


@triton.jit
def logits_and_weight_gradients(
    qkv, grad_out, bias, query_rows, rows, m, n, q_factor, k_factor, channels,
    N: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T + bias and dO v^T of a tile of pairs, (BLOCK, KEYS) each."""
    s = bias
    gradient = zeros(BLOCK, KEYS)
    for first in tl.range(0, D, PART, loop_unroll_factor=1, disable_licm=True):
        q = load_part(qkv, query_rows, m, first, 3 * channels, N, D, PART) * q_factor[:, None]
        k = load_part(qkv + channels, rows, n, first, 3 * channels, N, D, PART) * k_factor[:, None]
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        part = load_part(grad_out, query_rows, m, first, channels, N, D, PART)
        v = load_part(qkv + 2 * channels, rows, n, first, 3 * channels, N, D, PART)
        gradient = tl.dot(part, tl.trans(v), gradient, input_precision=PRECISION)
    return s, gradient


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def forward_wide_kernel(
    QKV, BIAS, SCALE, OUT, LSE,
    height, width, grid_rows, grid_columns, shift_row, shift_column, heads,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, for a tile of `BLOCK` queries, over tiles of `KEYS` keys with a running maximum."""
    tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK
    parts: tl.constexpr = (D + PART - 1) // PART
    tile, head, index = split_program(heads, tiles)
    window = locate_window(index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N, D)
    channels = heads * D
    qkv = QKV + window.qkv
    m = tile * BLOCK + tl.arange(0, BLOCK)
    query_rows = token_rows(m, window, WH, WW)
    query_region = token_regions(m, window, WH, WW)
    square = sum_products(qkv, qkv, query_rows, m, 3 * channels, 3 * channels, N, D, PART, BLOCK)
    q_factor = unit_factor(square, COSINE) * (logit_factor(SCALE, head, COSINE, D) * LOG2E)
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    attended = ()
    for _ in tl.static_range(parts):
        attended = attended + (zeros(BLOCK, PART),)
    for start in range(0, N, KEYS):
        n = start + tl.arange(0, KEYS)
        rows = token_rows(n, window, WH, WW)
        k_square = sum_products(qkv + channels, qkv + channels, rows, n, 3 * channels, 3 * channels, N, D, PART, KEYS)
        k_factor = unit_factor(k_square, COSINE)
        s = load_bias(BIAS + head * N * N, m, n, N % BLOCK == 0 and N % KEYS == 0, N, False)
        for first in tl.range(0, D, PART, loop_unroll_factor=1, disable_licm=True):
            q = load_part(qkv, query_rows, m, first, 3 * channels, N, D, PART) * q_factor[:, None]
            k = load_part(qkv + channels, rows, n, first, 3 * channels, N, D, PART) * k_factor[:, None]
            s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        if SHIFTED:
            region = token_regions(n, window, WH, WW)
            s = mask_regions(s, query_region, region)
        higher = tl.maximum(peak, tl.max(s, 1))
        lowered = tl.exp2(peak - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * lowered + tl.sum(p, 1)
        peak = higher
        sums = ()
        for i in tl.static_range(parts):
            v = load_part(qkv + 2 * channels, rows, n, i * PART, 3 * channels, N, D, PART)
            sums = sums + (tl.dot(p, v, attended[i] * lowered[:, None], input_precision=PRECISION),)
        attended = sums
    for i in tl.static_range(parts):
        d = i * PART + tl.arange(0, PART)
        pointers = OUT + window.out + query_rows[:, None] * channels + d[None, :]
        value = attended[i] * (1.0 / total)[:, None]
        tl.store(pointers, value.to(OUT.dtype.element_ty), mask=(m[:, None] < N) & (d[None, :] < D))
    tl.store(LSE + window.statistics + m, peak + tl.log2(total), mask=m < N)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def query_only_wide_kernel(
    QKV, BIAS, SCALE, OUT, LSE, GRAD_OUT, DELTA, GRAD_QKV, GRAD_SCALE,
    height, width, grid_rows, grid_columns, shift_row, shift_column, heads,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """As `query_only_kernel`."""
    tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK
    parts: tl.constexpr = (D + PART - 1) // PART
    tile, head, index = split_program(heads, tiles)
    window = locate_window(index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N, D)
    channels = heads * D
    qkv = QKV + window.qkv
    m = tile * BLOCK + tl.arange(0, BLOCK)
    query_rows = token_rows(m, window, WH, WW)
    query_region = token_regions(m, window, WH, WW)
    factor = logit_factor(SCALE, head, COSINE, D)
    square = sum_products(qkv, qkv, query_rows, m, 3 * channels, 3 * channels, N, D, PART, BLOCK)
    inverse = unit_factor(square, COSINE)
    delta = sum_products(GRAD_OUT + window.out, OUT + window.out, query_rows, m, channels, channels, N, D, PART, BLOCK)
    tl.store(DELTA + window.statistics + m, delta, mask=m < N)
    lse = tl.load(LSE + window.statistics + m, mask=m < N, other=float("inf"))
    gradients = ()
    for _ in tl.static_range(parts):
        gradients = gradients + (zeros(BLOCK, PART),)
    for start in range(0, N, KEYS):
        n = start + tl.arange(0, KEYS)
        rows = token_rows(n, window, WH, WW)
        k_square = sum_products(qkv + channels, qkv + channels, rows, n, 3 * channels, 3 * channels, N, D, PART, KEYS)
        k_factor = unit_factor(k_square, COSINE)
        bias = load_bias(BIAS + head * N * N, m, n, N % BLOCK == 0 and N % KEYS == 0, N, False)
        s, dp = logits_and_weight_gradients(
            qkv, GRAD_OUT + window.out, bias, query_rows, rows, m, n, inverse * (factor * LOG2E), k_factor, channels,
            N, D, PART, BLOCK, KEYS, PRECISION,
        )  # fmt: skip
        if SHIFTED:
            region = token_regions(n, window, WH, WW)
            s = mask_regions(s, query_region, region)
        ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
        sums = ()
        for i in tl.static_range(parts):
            k = load_part(qkv + channels, rows, n, i * PART, 3 * channels, N, D, PART) * k_factor[:, None]
            sums = sums + (tl.dot(ds, k, gradients[i], input_precision=PRECISION),)
        gradients = sums
    # Through the unit vector, as `through_unit`: the gradient loses its part along the query.
    along = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(parts):
        q = load_part(qkv, query_rows, m, i * PART, 3 * channels, N, D, PART)
        along += tl.sum(gradients[i] * q, 1) * inverse * factor
    lost = tl.where(tl.sqrt(square) > NORM_EPS, along, 0.0)
    for i in tl.static_range(parts):
        gradient = gradients[i] * factor
        if COSINE:
            q = load_part(qkv, query_rows, m, i * PART, 3 * channels, N, D, PART)
            gradient = (gradient - lost[:, None] * q * inverse[:, None]) * inverse[:, None]
        d = i * PART + tl.arange(0, PART)
        pointers = GRAD_QKV + window.qkv + query_rows[:, None] * (3 * channels) + d[None, :]
        tl.store(pointers, gradient.to(GRAD_QKV.dtype.element_ty), mask=(m[:, None] < N) & (d[None, :] < D))
    if COSINE:
        own = index.to(tl.int64) * heads + head
        tl.store(GRAD_SCALE + own * tiles + tile, tl.sum(tl.where(m < N, along, 0.0), 0))


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def bias_gradient_wide_kernel(
    QKV, BIAS, SCALE, LSE, GRAD_OUT, DELTA, GRAD_BIAS,
    height, width, grid_rows, grid_columns, shift_row, shift_column, heads, total_windows, groups,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """As `bias_gradient_kernel`."""
    query_tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK
    key_tiles: tl.constexpr = (N + KEYS - 1) // KEYS
    pair, head, group = split_program(heads, query_tiles * key_tiles)
    m = pair % query_tiles * BLOCK + tl.arange(0, BLOCK)
    n = pair // query_tiles * KEYS + tl.arange(0, KEYS)
    channels = heads * D
    factor = logit_factor(SCALE, head, COSINE, D) * LOG2E
    bias_sum = zeros(BLOCK, KEYS)
    for number in range((total_windows - group + groups - 1) // groups):
        index = group + number * groups
        window = locate_window(index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N, D)
        qkv = QKV + window.qkv
        grad_out = GRAD_OUT + window.out
        query_rows = token_rows(m, window, WH, WW)
        rows = token_rows(n, window, WH, WW)
        q_square = sum_products(qkv, qkv, query_rows, m, 3 * channels, 3 * channels, N, D, PART, BLOCK)
        k_square = sum_products(qkv + channels, qkv + channels, rows, n, 3 * channels, 3 * channels, N, D, PART, KEYS)
        bias = load_bias(BIAS + head * N * N, m, n, N % BLOCK == 0 and N % KEYS == 0, N, False)
        s, dp = logits_and_weight_gradients(
            qkv, grad_out, bias, query_rows, rows, m, n,
            unit_factor(q_square, COSINE) * factor, unit_factor(k_square, COSINE), channels,
            N, D, PART, BLOCK, KEYS, PRECISION,
        )  # fmt: skip
        if SHIFTED:
            query_region = token_regions(m, window, WH, WW)
            region = token_regions(n, window, WH, WW)
            s = mask_regions(s, query_region, region)
        lse = tl.load(LSE + window.statistics + m, mask=m < N, other=float("inf"))
        delta = tl.load(DELTA + window.statistics + m, mask=m < N, other=0.0)
        bias_sum += tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    pointers = GRAD_BIAS + (group * heads + head).to(tl.int64) * N * N + m[:, None] * N + n[None, :]
    tl.store(pointers, bias_sum, mask=(m[:, None] < N) & (n[None, :] < N))
