"""The Triton kernels of LayerNorm with its residual sum: one forward, one backward, compile-time switches for the three forms.

A program works on ROWS rows at a time, each row whole in registers (BLOCK >= C channels), arithmetic in fp32. ORDER: 0 plain,
1 post-norm (residual + scale * LN(x)), 2 pre-norm (sum = residual + scale * x, LN(sum)).
"""

import triton
import triton.language as tl

PLAIN, POST, PRE = 0, 1, 2
SIZE_ARGUMENTS = ("rows", "rows_per_sample", "groups")  # never compiled in: no variants for 1 and for multiples of 16


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def forward_kernel(
    x,  # the branch (plain: the input)
    residual,
    scale,  # fp32, one a sample
    weight,
    bias,
    out,
    total,  # pre-norm: the sum
    mean,
    rstd,
    rows,
    rows_per_sample,
    eps,
    ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if SCALED:
        factor = tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0)
    if ORDER == 2:
        value = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32) + factor[:, None] * value
        # What is normalised is the sum as it is stored.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    centre = tl.sum(value, axis=1) / C
    centred = tl.where(inside, value - centre[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rstd + row, inverse, mask=row < rows)
    gain = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
    normed = centred * inverse[:, None] * gain[None, :] + offset[None, :]
    if ORDER == 1:
        normed = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32) + factor[:, None] * normed
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def backward_kernel(
    x,  # what was normalised: the branch, or pre-norm's sum
    scale,
    weight,
    mean,
    rstd,
    grad_out,
    grad_total,  # pre-norm: the gradient that reaches the sum directly
    grad_x,  # of what was normalised; pre-norm: of the sum, which is also the residual's
    grad_branch,  # pre-norm with a scale
    grad_weight,  # (groups, C), fp32: one row for each program
    grad_bias,
    rows,
    rows_per_sample,
    groups,
    ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    group = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    for start in range(group * ROWS, rows, groups * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + column[None, :]
        centre = tl.load(mean + row, mask=row < rows, other=0.0)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        factor = tl.full((ROWS,), 1.0, tl.float32)
        if SCALED:
            factor = tl.load(scale + row // rows_per_sample, mask=row < rows, other=0.0)
        if ORDER == 1:
            grad = grad * factor[:, None]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(inside, (value - centre[:, None]) * inverse[:, None], 0.0)
        sum_weight += tl.sum(grad * unit, axis=0)
        sum_bias += tl.sum(grad, axis=0)
        inner = grad * gain[None, :]
        along = tl.sum(inner * unit, axis=1) / C
        level = tl.sum(inner, axis=1) / C
        grad = (inner - level[:, None] - unit * along[:, None]) * inverse[:, None]
        if ORDER == 2:
            grad += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
            if SCALED:
                tl.store(grad_branch + at, (grad * factor[:, None]).to(grad_branch.dtype.element_ty), mask=inside)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + group.to(tl.int64) * C + column, sum_weight, mask=column < C)
    tl.store(grad_bias + group.to(tl.int64) * C + column, sum_bias, mask=column < C)
