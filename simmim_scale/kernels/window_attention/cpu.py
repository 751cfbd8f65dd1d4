"""Window attention on a CPU: a few images and heads at a time, so that intermediate results stay in the cache.

Saves the projection in the order of the windows, one n x n matrix of weights and two numbers for each token and head; plain
autograd saves two such matrices and copies of q, k, v. In bf16 the weights are rounded for backward and for the product with v,
which is in bf16; all else is fp32, logits and their gradients above all.
Letters: b batch, n tokens of one window, d head dim, m matrices of a chunk (images * windows * heads).
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels.window_attention.reference import MAX_LOGIT_SCALE, NORM_EPS
from simmim_scale.kernels.window_attention.regions import MASKED_LOGIT, axis_regions

CHUNK_BYTES = 12 << 20  # q, k, v per thread of a chunk, in fp32
STRIP_PART = 6  # a strip's logits take a sixth of that: they stay in the cache


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """Only on a CPU."""
    if device.type != "cpu":
        return f"it runs on a CPU, got {device.type}"
    return None if dtype.is_floating_point else f"it needs a floating-point type, got {dtype}"


def window_attention(
    qkv: Float[Tensor, "b h w c3"],
    bias: Float[Tensor, "heads n n"],
    *,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    logit_scale: Float[Tensor, "heads"] | None,
) -> Float[Tensor, "b h w c"]:
    """See the contract in `kernels/window_attention/__init__.py`."""
    inputs = (qkv, bias, logit_scale)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    room = CHUNK_BYTES * _threads()
    return torch.ops.simmim_scale.cpu_attention(*inputs, num_heads, window, shift, room, keep)[0]


@torch.compiler.assume_constant_result  # a number in the graph; another number of threads only cuts the work otherwise
def _threads() -> int:
    return torch.get_num_threads()


@dataclass(frozen=True)
class _Chunk:
    """Images and heads that are worked on together."""

    images: slice
    heads: slice
    grid: tuple[int, int, int]  # images, rows and columns of windows
    first: int  # matrices of the chunks before

    @property
    def num_heads(self) -> int:
        return self.heads.stop - self.heads.start

    @property
    def matrices(self) -> int:
        return math.prod(self.grid) * self.num_heads

    def of(self, saved: Tensor, parts: int) -> Tensor:
        """The chunk's place in what is saved for all chunks, (parts, m, ...)."""
        last = self.first + self.matrices
        return saved[parts * self.first : parts * last].view(parts, self.matrices, *saved.shape[1:])


@dataclass(frozen=True)
class _Strip:
    """Windows of a chunk: whole images, or some rows of windows of one."""

    matrices: slice
    grid: tuple[int, int, int]
    last_row: bool  # whether it ends where an image does


@dataclass(frozen=True)
class _Plan:
    """Sizes, and how tensors are cut."""

    heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    room: int  # bytes of a chunk's q, k, v

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    def chunks(self, shape: torch.Size, itemsize: int) -> Iterator[_Chunk]:
        """Chunks of (b, h, w, c); heads are cut only where one image or one row of windows alone is too large."""
        batch, height, width, channels = shape
        rows, columns = height // self.window[0], width // self.window[1]
        room = max(self.room // (3 * height * width * channels // self.heads * itemsize), 1)  # in heads of an image
        heads = min(room, self.heads, max(self._strip_room(itemsize) // columns, 1))
        images = max(room // self.heads, 1)
        first = 0
        for image in range(0, batch, images):
            for head in range(0, self.heads, heads):
                some = slice(image, min(image + images, batch)), slice(head, min(head + heads, self.heads))
                chunk = _Chunk(*some, (some[0].stop - image, rows, columns), first)
                first += chunk.matrices
                yield chunk

    def strips(self, chunk: _Chunk, itemsize: int) -> Iterator[_Strip]:
        """At least one row of windows each."""
        images, rows, columns = chunk.grid
        per_row = columns * chunk.num_heads
        room = max(self._strip_room(itemsize) // per_row, 1)  # in rows
        for image in range(0, images, max(room // rows, 1)):
            some = min(max(room // rows, 1), images - image)
            for row in range(0, rows, room):
                grid = (some, min(room, rows - row), columns)
                first = (image * rows + row) * per_row
                yield _Strip(slice(first, first + grid[0] * grid[1] * per_row), grid, row + grid[1] == rows)

    def _strip_room(self, itemsize: int) -> int:
        """In matrices."""
        return self.room // (STRIP_PART * self.tokens**2 * itemsize)

    def blocks(self, x: Tensor, parts: int) -> Tensor:
        """A view of (b, h, w, parts * c) as (parts, b, rows, columns, heads, window height, window width, d)."""
        batch, height, width, channels = x.shape
        rows, columns = height // self.window[0], width // self.window[1]
        cut = x.view(batch, rows, self.window[0], columns, self.window[1], parts, self.heads, channels // parts // self.heads)
        return cut.permute(5, 0, 1, 3, 6, 2, 4, 7)

    def take(self, blocks: Tensor, chunk: _Chunk, *, out: Tensor) -> Tensor:
        """One chunk of `blocks`, copied to `out`, (parts, m, n, d)."""
        own = blocks[:, chunk.images, :, :, chunk.heads]
        out.view(own.shape).copy_(own)
        return out

    def put(self, blocks: Tensor, chunk: _Chunk, value: Tensor) -> None:
        """Write a chunk where `take` reads it."""
        own = blocks[:, chunk.images, :, :, chunk.heads]
        own.copy_(value.view(own.shape))

    def mask_(self, logits: Tensor, strip: _Strip) -> None:
        """Add -100 between regions: only the last windows of a shifted axis hold more than one."""
        view = logits.view(*strip.grid, -1, self.tokens, self.tokens)
        down, right = self.shift[0] if strip.last_row else 0, self.shift[1]
        if down and right:
            view[:, -1, :-1] += _region_mask(self.window, (down, 0), logits.dtype)
            view[:, :-1, -1] += _region_mask(self.window, (0, right), logits.dtype)
            view[:, -1, -1] += _region_mask(self.window, self.shift, logits.dtype)
        elif down:
            view[:, -1] += _region_mask(self.window, self.shift, logits.dtype)
        elif right:
            view[:, :, -1] += _region_mask(self.window, (0, right), logits.dtype)


@functools.lru_cache(maxsize=64)
def _region_mask(window: tuple[int, int], shift: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(n, n), -100 between tokens of different regions of a last window."""
    row, column = (axis_regions(side, side, moved) for side, moved in zip(window, shift, strict=True))
    region = (3 * row[:, None] + column[None, :]).reshape(-1)
    return torch.from_numpy(region[:, None] != region[None, :]).to(dtype) * MASKED_LOGIT


def _forward(
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    room: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The attended values, and where `keep` says so what backward needs, chunk after chunk: weights, q k v, factors."""
    plan = _Plan(heads, (window[0], window[1]), (shift[0], shift[1]), room)
    output, kept, windows, factors = _results(qkv, bias, logit_scale, heads, window, shift, room, keep)
    blocks, out_blocks = plan.blocks(_roll(qkv, plan.shift, -1), 3), plan.blocks(output, 1)
    wide, operand = torch.promote_types(qkv.dtype, torch.float32), _operand_type(qkv.dtype)
    with _exact():
        for chunk in plan.chunks(output.shape, wide.itemsize):
            taken = chunk.of(windows, 3) if keep else qkv.new_empty(3, chunk.matrices, plan.tokens, blocks.shape[-1])
            plan.take(blocks, chunk, out=taken)
            vectors = taken[:2].to(wide, copy=True)
            factor = _factor(vectors, logit_scale, chunk)
            if keep and logit_scale is not None:
                chunk.of(factors, 2).copy_(factor)
            q, k = vectors.mul_(factor)
            weights = chunk.of(kept, 1)[0] if keep else None
            attended = _attend(plan, chunk, q, k, taken[2].to(operand), bias, weights)
            plan.put(out_blocks, chunk, attended)
    return _roll(output, plan.shift, 1), kept, windows, factors


def _attend(plan: _Plan, chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor | None) -> Tensor:
    """Values of a chunk, (m, n, d); the weights are written to `kept` if given."""
    bias = bias[chunk.heads].to(q.dtype)
    strips = list(plan.strips(chunk, q.itemsize))
    scratch, attended = _scratch(strips, q, plan.tokens), torch.empty_like(v)
    for strip in strips:
        own = strip.matrices
        logits = scratch[: own.stop - own.start] if kept is None or kept.dtype != q.dtype else kept[own]
        logits.view(-1, *bias.shape).copy_(bias)
        plan.mask_(logits, strip)
        logits.baddbmm_(q[own], k[own].mT)
        torch.softmax(logits, dim=-1, out=logits)  # row by row, so it may overwrite its input
        weights = logits.to(v.dtype) if kept is None or kept.dtype == q.dtype else kept[own].copy_(logits)
        torch.bmm(weights, v[own], out=attended[own])
    return attended


def _backward(
    grad: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    kept: Tensor,
    windows: Tensor,
    factors: Tensor,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    room: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projection, the bias and the logit scale (empty where there is none)."""
    plan = _Plan(heads, (window[0], window[1]), (shift[0], shift[1]), room)
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_qkv = grad.new_empty(*grad.shape[:3], 3 * grad.shape[3])
    grad_bias = torch.zeros((_threads(), *bias.shape), dtype=wide)
    grad_scale = torch.zeros(heads if logit_scale is not None else 0, dtype=wide)
    grad_blocks, blocks = plan.blocks(_roll(grad, plan.shift, -1), 1), plan.blocks(grad_qkv, 3)
    with _exact():
        for chunk in plan.chunks(grad.shape, wide.itemsize):
            taken = chunk.of(windows, 3)
            qkv = taken.to(wide, copy=True)
            factor = _factor(qkv[:2], None, chunk) if logit_scale is None else chunk.of(factors, 2)
            qkv[:2].mul_(factor)
            grad_out = plan.take(grad_blocks, chunk, out=torch.empty_like(qkv[:1]))[0]
            grads = _product_gradients(plan, chunk, qkv, chunk.of(kept, 1)[0], grad_out, grad_bias)
            if logit_scale is not None:
                grad_scale[chunk.heads] += _leave_sphere(grads[:2], qkv[:2], _scale(logit_scale, chunk, wide))
            grads[:2].mul_(factor)
            plan.put(blocks, chunk, grads)
    if logit_scale is not None:
        grad_scale = (grad_scale * (logit_scale <= MAX_LOGIT_SCALE)).to(logit_scale.dtype)
    return _roll(grad_qkv, plan.shift, 1), grad_bias.sum(0).to(bias.dtype), grad_scale


def _product_gradients(plan: _Plan, chunk: _Chunk, qkv: Tensor, kept: Tensor, grad_out: Tensor, grad_bias: Tensor) -> Tensor:
    """Gradients of a chunk's q, k (as they were multiplied) and v, (3, m, n, d); the bias's is added to `grad_bias`."""
    (q, k, v), wide = qkv, qkv.dtype
    strips = list(plan.strips(chunk, wide.itemsize))
    grads, scratch = torch.empty_like(qkv), _scratch(strips, q, plan.tokens)
    scratch_weights = scratch if kept.dtype == wide else torch.empty_like(scratch)
    for strip in strips:
        own, count = strip.matrices, strip.matrices.stop - strip.matrices.start
        weights = kept[own] if kept.dtype == wide else scratch_weights[:count].copy_(kept[own])
        grad_logits = scratch[:count]
        torch.bmm(weights.mT, grad_out[own], out=grads[2, own])
        torch.bmm(grad_out[own], v[own].mT, out=grad_logits)  # of the weights; overwritten row by row
        torch.ops.aten._softmax_backward_data.out(grad_logits, weights, -1, wide, grad_input=grad_logits)
        _add_windows(grad_logits, grad_bias[:, chunk.heads])
        torch.bmm(grad_logits, k[own], out=grads[0, own])
        torch.bmm(grad_logits.mT, q[own], out=grads[1, own])
    return grads


def _add_windows(matrices: Tensor, sums: Tensor) -> None:
    """Add (windows * heads, n, n) to `sums`, (threads, heads, n, n): one for each thread, of the windows that it has just written
    and will write next. Reading what others wrote made the product that came next two to three times as slow."""
    heads = sums.shape[1]
    shares = math.gcd(matrices.shape[0] // heads, sums.shape[0])
    shared = matrices.view(shares, -1, *sums.shape[1:])
    if shared.shape[1] > 4:
        sums[:shares] += shared.sum(1)
        return
    for window in shared.unbind(1):  # a sum of few is slower than to add them
        sums[:shares] += window


def _leave_sphere(grads: Tensor, vectors: Tensor, scale: Tensor) -> Tensor:
    """Turn the gradients of q = scale * x / |x| and k = x / |x|, both (2, m, n, d), into those of f * x where f is a constant, in
    place: they lose their part along q and k. Returns the gradient of ln(scale), (heads,)."""
    along = (grads * vectors).sum(-1, keepdim=True)
    along_q = along[0].view(-1, *scale.shape, along.shape[2])
    grad_scale = along_q.sum((0, 2))
    square = scale.square().clamp_(min=torch.finfo(scale.dtype).tiny)  # |q|^2; where q is 0, its factor is 0 as well
    along_q.div_(square[:, None])
    grads.addcmul_(vectors, along, value=-1)
    return grad_scale


def _scratch(strips: Sequence[_Strip], like: Tensor, tokens: int) -> Tensor:
    """Memory for the matrices of any strip."""
    return like.new_empty(max(strip.matrices.stop - strip.matrices.start for strip in strips), tokens, tokens)


def _exact() -> contextlib.AbstractContextManager:
    """Autocast would round the fp32 logits of a chunk to half precision in forward, but not in backward."""
    return torch.autocast("cpu", enabled=False)


def _results(
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    room: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, channels = qkv.shape
    tokens = window[0] * window[1]
    matrices = batch * height * width // tokens * heads if keep else 0
    kept = qkv.new_empty(matrices, tokens, tokens, dtype=_operand_type(qkv.dtype))
    windows = qkv.new_empty(3 * matrices, tokens, channels // 3 // heads)
    normalised = 0 if logit_scale is None else 2 * matrices
    factors = qkv.new_empty(normalised, tokens, 1, dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty(batch, height, width, channels // 3), kept, windows, factors


def _gradients(
    grad: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    kept: Tensor,
    windows: Tensor,
    factors: Tensor,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    room: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_scale = bias.new_empty(0) if logit_scale is None else logit_scale.new_empty(logit_scale.shape)
    return grad.new_empty(*grad.shape[:3], 3 * grad.shape[3]), bias.new_empty(bias.shape), grad_scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The room is kept too: backward has to cut as forward did, and the number of threads may change in between.
    _, bias, logit_scale, *ctx.plan, _ = inputs
    ctx.save_for_backward(bias, logit_scale, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_kept: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    bias, logit_scale, *kept = ctx.saved_tensors  # read once: activation checkpointing recomputes them then
    grads = torch.ops.simmim_scale.cpu_attention_backward(grad, bias, logit_scale, *kept, *ctx.plan)
    return *grads[:2], None if logit_scale is None else grads[2], None, None, None, None, None


# Operators, so that torch.compile does not break its graph here, nor unrolls the chunks into it.
_PLAN = "int heads, int[] window, int[] shift, int room"
_FORWARD = torch.library.custom_op(
    "simmim_scale::cpu_attention",
    _forward,
    mutates_args=(),
    schema=f"(Tensor qkv, Tensor bias, Tensor? logit_scale, {_PLAN}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
_FORWARD.register_fake(_results)
_FORWARD.register_autograd(_differentiate, setup_context=_keep)
_BACKWARD = torch.library.custom_op(
    "simmim_scale::cpu_attention_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor bias, Tensor? logit_scale, Tensor kept, Tensor windows, Tensor factors, "
    f"{_PLAN}) -> (Tensor, Tensor, Tensor)",
)
_BACKWARD.register_fake(_gradients)


def _factor(vectors: Tensor, logit_scale: Tensor | None, chunk: _Chunk) -> Tensor:
    """What a chunk's q and k, (2, m, n, d), are multiplied by, as far as they differ: (2, m, n, 1). V1's are constants."""
    if logit_scale is None:
        return vectors.new_tensor([vectors.shape[-1] ** -0.5, 1.0]).view(2, 1, 1, 1)
    factor = _inverse_norm(vectors)
    factor[0].view(-1, chunk.num_heads, vectors.shape[2]).mul_(_scale(logit_scale, chunk, vectors.dtype)[:, None])
    return factor


def _scale(logit_scale: Tensor, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    """exp of the chunk's log-scales, (heads,)."""
    return logit_scale[chunk.heads].to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()


def _operand_type(dtype: torch.dtype) -> torch.dtype:
    """Of the products with the weights: a CPU multiplies bf16 faster than fp32, but not fp16."""
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


def _inverse_norm(vectors: Tensor) -> Tensor:
    """1 / |vector|, (..., 1); 0 for zero vectors, as in the reference."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return norm / norm.square().clamp_(min=NORM_EPS**2)


def _roll(x: Tensor, shift: tuple[int, int], sign: int) -> Tensor:
    """`torch.roll` of axes 1 and 2 by sign * shift, contiguous; in one pass over memory, where torch.roll takes one per axis."""
    if not any(shift):
        return x.contiguous()
    height, width = x.shape[1:3]
    down, right = sign * shift[0] % height, sign * shift[1] % width
    rolled = torch.empty(x.shape, dtype=x.dtype)
    for rows, source_rows in _halves(height, down):
        for columns, source_columns in _halves(width, right):
            rolled[:, rows, columns] = x[:, source_rows, source_columns]
    return rolled


def _halves(side: int, moved: int) -> list[tuple[slice, slice]]:
    """(where to, where from) of the two parts of an axis that is rolled by `moved`."""
    return [(slice(moved, side), slice(0, side - moved)), (slice(0, moved), slice(side - moved, side))]
