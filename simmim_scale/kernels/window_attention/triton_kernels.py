"""The Triton kernels of window attention: forward; gradients of q, bias and logit scale; gradients of k and v.

q, k, v are read from the un-partitioned projection (b, h, w, 3c) and written where they belong: `triton_partition.py` finds the
place. Logits are in units of log2: the factor log2(e) is folded into q and into the bias that is passed in.

Letters in shapes: m queries of a tile, n keys of a tile, d head dim (DP: the power of two that holds it). The keys of a window
are cut into tiles of powers of two, 144 = 128 + 16, so that little is padded; STARTS and SIZES list them.
"""

import triton
import triton.language as tl

from simmim_scale.kernels.window_attention.triton_partition import (
    locate_window,
    mask_regions,
    split_program,
    token_regions,
    token_rows,
)

LOG2E = tl.constexpr(1.4426950408889634)
MAX_LOGIT_SCALE = tl.constexpr(4.605170185988092)  # ln 100
NORM_EPS = tl.constexpr(1e-12)
# Never compiled in. Triton makes variants of a kernel for sizes of 1 and for multiples of 16: none of those would be one of the
# kernels that were compiled ahead of time and found not to spill.
SIZE_ARGUMENTS = (
    *("height", "width", "grid_rows", "grid_columns", "shift_row", "shift_column", "heads"),
    *("total_windows", "groups"),
)


@triton.jit
def load_tile(base, rows, token, stride, EXACT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """(tokens, DP) of a matrix with `stride` channels; zero beyond the window and the head dim."""
    d = tl.arange(0, DP)
    pointers = base + rows[:, None] * stride + d[None, :]
    if EXACT and D == DP:
        tile = tl.load(pointers)
    elif EXACT:
        tile = tl.load(pointers, mask=d[None, :] < D, other=0.0)
    else:
        tile = tl.load(pointers, mask=(token[:, None] < N) & (d[None, :] < D), other=0.0)
    return tile


@triton.jit
def store_tile(base, rows, token, stride, tile, EXACT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    pointers = base + rows[:, None] * stride + d[None, :]
    value = tile.to(base.dtype.element_ty)
    if EXACT and D == DP:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=(token[:, None] < N) & (d[None, :] < D))


@triton.jit
def load_bias(base, query, key, EXACT: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Bias of a tile of pairs, (m, n), or (n, m) where transposed; -inf for what is not in the window."""
    if TRANSPOSED:
        pointers = base + query[None, :] * N + key[:, None]
        inside = (query[None, :] < N) & (key[:, None] < N)
    else:
        pointers = base + query[:, None] * N + key[None, :]
        inside = (query[:, None] < N) & (key[None, :] < N)
    if EXACT:
        bias = tl.load(pointers)
    else:
        bias = tl.load(pointers, mask=inside, other=-float("inf"))
    return bias


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix of fp32. A function of its own, since Triton 3.6 takes no shape of which a part comes from a tuple."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def inverse_norm(square):
    """1 / |vector| from its square; 0 for zero vectors, as in the reference."""
    return tl.where(square > 0, 1.0 / tl.maximum(tl.sqrt(square), NORM_EPS), 0.0)


@triton.jit
def logit_factor(SCALE, head, COSINE: tl.constexpr, D: tl.constexpr):
    """What unit vectors (V1: plain ones) are multiplied by; the raw logit scale is clamped here."""
    if COSINE:
        factor = tl.exp(tl.minimum(tl.load(SCALE + head).to(tl.float32), MAX_LOGIT_SCALE))
    else:
        factor = D**-0.5
    return factor


@triton.jit
def scaled_query(q, factor, COSINE: tl.constexpr):
    """Queries as they enter the dot product, in their own type, with the factor and log2(e) folded in."""
    wide = q.to(tl.float32)
    if COSINE:
        scaled = wide * (inverse_norm(tl.sum(wide * wide, 1)) * (factor * LOG2E))[:, None]
    else:
        scaled = wide * (factor * LOG2E)
    return scaled.to(q.dtype)


@triton.jit
def unit_key(k, COSINE: tl.constexpr):
    """Keys as they enter the dot product: unit vectors (V1: as they are)."""
    unit = k
    if COSINE:
        wide = k.to(tl.float32)
        unit = (wide * inverse_norm(tl.sum(wide * wide, 1))[:, None]).to(k.dtype)
    return unit


@triton.jit
def through_unit(gradient, vector, COSINE: tl.constexpr):
    """Gradient of a vector from that of its unit vector, and their inner product, fp32. V1: as it is."""
    along = tl.sum(gradient, 1)
    if COSINE:
        wide = vector.to(tl.float32)
        square = tl.sum(wide * wide, 1)
        inverse = inverse_norm(square)
        unit = wide * inverse[:, None]
        along = tl.sum(gradient * unit, 1)
        # Below eps the length is a constant of the formula, and the part along the vector stays.
        lost = tl.where(tl.sqrt(square) > NORM_EPS, along, 0.0)
        gradient = (gradient - lost[:, None] * unit) * inverse[:, None]
    return gradient, along


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def forward_kernel(
    QKV, BIAS, SCALE, OUT, LSE,
    height, width, grid_rows, grid_columns, shift_row, shift_column, heads,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, HOLD: tl.constexpr, STARTS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Output and log2-sum-exp of one head of one window; `TILES` tiles of `BLOCK` queries, one after another.

    HOLD: the keys and values of the window are loaded once and kept; else each tile of queries reads them again.
    """
    _, head, index = split_program(heads, 1)
    window = locate_window(index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N, D)
    channels = heads * D
    qkv = QKV + window.qkv
    out = OUT + window.out
    lse = LSE + window.statistics
    factor = logit_factor(SCALE, head, COSINE, D)
    keys = ()
    values = ()
    if HOLD:
        for i in tl.static_range(len(SIZES)):
            n = STARTS[i] + tl.arange(0, SIZES[i])
            rows = token_rows(n, window, WH, WW)
            k = load_tile(qkv + channels, rows, n, 3 * channels, STARTS[i] + SIZES[i] <= N, N, D, DP)
            keys = keys + (unit_key(k, COSINE),)
            values = values + (load_tile(qkv + 2 * channels, rows, n, 3 * channels, STARTS[i] + SIZES[i] <= N, N, D, DP),)
    for tile in range(TILES):
        m = (tl.program_id(1) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        query_rows = token_rows(m, window, WH, WW)
        q = scaled_query(load_tile(qkv, query_rows, m, 3 * channels, N % BLOCK == 0, N, D, DP), factor, COSINE)
        query_region = token_regions(m, window, WH, WW)
        scores = ()
        peak = tl.full((BLOCK,), -float("inf"), tl.float32)
        for i in tl.static_range(len(SIZES)):
            n = STARTS[i] + tl.arange(0, SIZES[i])
            if HOLD:
                k = keys[i]
            else:
                rows = token_rows(n, window, WH, WW)
                k = load_tile(qkv + channels, rows, n, 3 * channels, STARTS[i] + SIZES[i] <= N, N, D, DP)
                k = unit_key(k, COSINE)
            bias = load_bias(BIAS + head * N * N, m, n, N % BLOCK == 0 and STARTS[i] + SIZES[i] <= N, N, False)
            s = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION)
            if SHIFTED:
                region = token_regions(n, window, WH, WW)
                s = mask_regions(s, query_region, region)
            scores = scores + (s,)
            peak = tl.maximum(peak, tl.max(s, 1))
        total = tl.zeros((BLOCK,), tl.float32)
        attended = tl.zeros((BLOCK, DP), tl.float32)
        for i in tl.static_range(len(SIZES)):
            p = tl.exp2(scores[i] - peak[:, None])
            total += tl.sum(p, 1)
            if HOLD:
                v = values[i]
            else:
                n = STARTS[i] + tl.arange(0, SIZES[i])
                rows = token_rows(n, window, WH, WW)
                v = load_tile(qkv + 2 * channels, rows, n, 3 * channels, STARTS[i] + SIZES[i] <= N, N, D, DP)
            attended = tl.dot(p.to(v.dtype), v, attended, input_precision=PRECISION)
        attended = attended * (1.0 / total)[:, None]
        store_tile(out, query_rows, m, channels, attended, N % BLOCK == 0, N, D, DP)
        tl.store(lse + m, peak + tl.log2(total), mask=m < N)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def query_gradient_kernel(
    QKV, BIAS, SCALE, OUT, LSE, GRAD_OUT, DELTA, GRAD_QKV, GRAD_BIAS, GRAD_SCALE,
    height, width, grid_rows, grid_columns, shift_row, shift_column, heads, total_windows, groups,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, STARTS: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Gradients of q, of the bias and of the logit scale, and delta = sum(gradient of the output * output) for the other kernel.

    One program takes a tile of queries of one head through every `groups`-th window and keeps the gradient of the bias in
    registers: each group stores its own sum, so nothing is added atomically and the result is the same every time.
    """
    tiles: tl.constexpr = (N + BLOCK - 1) // BLOCK
    tile, head, group = split_program(heads, tiles)
    channels = heads * D
    m = tile * BLOCK + tl.arange(0, BLOCK)
    factor = logit_factor(SCALE, head, COSINE, D)
    bias_sums = ()
    for i in tl.static_range(len(SIZES)):
        bias_sums = bias_sums + (zeros(BLOCK, SIZES[i]),)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    for number in range((total_windows - group + groups - 1) // groups):
        index = group + number * groups
        window = locate_window(index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N, D)
        qkv = QKV + window.qkv
        query_rows = token_rows(m, window, WH, WW)
        q = load_tile(qkv, query_rows, m, 3 * channels, N % BLOCK == 0, N, D, DP)
        grad_out = load_tile(GRAD_OUT + window.out, query_rows, m, channels, N % BLOCK == 0, N, D, DP)
        out = load_tile(OUT + window.out, query_rows, m, channels, N % BLOCK == 0, N, D, DP)
        delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(DELTA + window.statistics + m, delta, mask=m < N)
        lse = tl.load(LSE + window.statistics + m, mask=m < N, other=float("inf"))
        scaled = scaled_query(q, factor, COSINE)
        query_region = token_regions(m, window, WH, WW)
        gradient = tl.zeros((BLOCK, DP), tl.float32)
        sums = ()
        for i in tl.static_range(len(SIZES)):
            n = STARTS[i] + tl.arange(0, SIZES[i])
            rows = token_rows(n, window, WH, WW)
            k = load_tile(qkv + channels, rows, n, 3 * channels, STARTS[i] + SIZES[i] <= N, N, D, DP)
            v = load_tile(qkv + 2 * channels, rows, n, 3 * channels, STARTS[i] + SIZES[i] <= N, N, D, DP)
            k = unit_key(k, COSINE)
            bias = load_bias(BIAS + head * N * N, m, n, N % BLOCK == 0 and STARTS[i] + SIZES[i] <= N, N, False)
            s = tl.dot(scaled, tl.trans(k), bias, input_precision=PRECISION)
            if SHIFTED:
                region = token_regions(n, window, WH, WW)
                s = mask_regions(s, query_region, region)
            p = tl.exp2(s - lse[:, None])
            ds = p * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
            sums = sums + (bias_sums[i] + ds,)
            gradient = tl.dot(ds.to(k.dtype), k, gradient, input_precision=PRECISION)
        bias_sums = sums
        gradient, along = through_unit(gradient * factor, q, COSINE)
        scale_sum += tl.where(m < N, along, 0.0)
        store_tile(
            GRAD_QKV + window.qkv,
            query_rows, m, 3 * channels, gradient, N % BLOCK == 0, N, D, DP,
        )  # fmt: skip
    own = (group * heads + head).to(tl.int64)
    for i in tl.static_range(len(SIZES)):
        n = STARTS[i] + tl.arange(0, SIZES[i])
        pointers = GRAD_BIAS + own * N * N + m[:, None] * N + n[None, :]
        tl.store(pointers, bias_sums[i], mask=(m[:, None] < N) & (n[None, :] < N))
    if COSINE:
        tl.store(GRAD_SCALE + own * tiles + tile, tl.sum(scale_sum, 0))


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def key_value_gradient_kernel(
    QKV, BIAS, SCALE, LSE, GRAD_OUT, DELTA, GRAD_QKV,
    height, width, grid_rows, grid_columns, shift_row, shift_column, heads,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    COSINE: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v for a tile of `KEYS` keys of one head of one window, over tiles of `BLOCK` queries.

    Works on the transposed logits (n, m), so that no tile of weights is transposed for the products.
    """
    tiles: tl.constexpr = (N + KEYS - 1) // KEYS
    tile, head, index = split_program(heads, tiles)
    window = locate_window(index, head, heads, height, width, grid_rows, grid_columns, shift_row, shift_column, N, D)
    channels = heads * D
    qkv = QKV + window.qkv
    grad_out_base = GRAD_OUT + window.out
    n = tile * KEYS + tl.arange(0, KEYS)
    rows = token_rows(n, window, WH, WW)
    region = token_regions(n, window, WH, WW)
    key = load_tile(qkv + channels, rows, n, 3 * channels, N % KEYS == 0, N, D, DP)
    v = load_tile(qkv + 2 * channels, rows, n, 3 * channels, N % KEYS == 0, N, D, DP)
    k = unit_key(key, COSINE)
    factor = logit_factor(SCALE, head, COSINE, D)
    grad_k = tl.zeros((KEYS, DP), tl.float32)
    grad_v = tl.zeros((KEYS, DP), tl.float32)
    for start in range(0, N, BLOCK):
        m = start + tl.arange(0, BLOCK)
        query_rows = token_rows(m, window, WH, WW)
        q = scaled_query(load_tile(qkv, query_rows, m, 3 * channels, N % BLOCK == 0, N, D, DP), factor, COSINE)
        grad_out = load_tile(grad_out_base, query_rows, m, channels, N % BLOCK == 0, N, D, DP)
        lse = tl.load(LSE + window.statistics + m, mask=m < N, other=float("inf"))
        delta = tl.load(DELTA + window.statistics + m, mask=m < N, other=0.0)
        bias = load_bias(BIAS + head * N * N, m, n, N % BLOCK == 0 and N % KEYS == 0, N, True)
        s = tl.dot(k, tl.trans(q), bias, input_precision=PRECISION)
        if SHIFTED:
            query_region = token_regions(m, window, WH, WW)
            s = mask_regions(s, region, query_region)
        p = tl.exp2(s - lse[None, :])
        grad_v = tl.dot(p.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
        grad_k = tl.dot(ds.to(v.dtype), q, grad_k, input_precision=PRECISION)
    # The queries above carry the factor that the gradient of a unit key needs, and log2(e), which it does not.
    grad_k, _ = through_unit(grad_k * (1.0 / LOG2E), key, COSINE)
    grad_qkv = GRAD_QKV + window.qkv
    store_tile(grad_qkv + channels, rows, n, 3 * channels, grad_k, N % KEYS == 0, N, D, DP)
    store_tile(grad_qkv + 2 * channels, rows, n, 3 * channels, grad_v, N % KEYS == 0, N, D, DP)
