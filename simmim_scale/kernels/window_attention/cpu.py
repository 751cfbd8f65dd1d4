"""Window attention on a CPU: a few images and heads at a time, so that intermediate results stay in the cache.

Saves the projection and one n x n matrix per window and head for backward, where plain autograd saves two and copies of q, k, v.
In bf16 these weights are rounded for the products with v and with the gradient, which are rounded too and twice as fast then; all
else is fp32, logits and their gradients above all.
Letters: b batch, n tokens of one window, d head dim.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels.window_attention.reference import MAX_LOGIT_SCALE, NORM_EPS
from simmim_scale.kernels.window_attention.regions import MASKED_LOGIT, axis_regions

CHUNK_BYTES = 4 << 20  # logits per thread that are worked on at once: a share of the last-level cache


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
    out, _ = torch.ops.simmim_scale.cpu_attention(*inputs, num_heads, window, shift, room, keep)
    return out


@torch.compiler.assume_constant_result  # a number in the graph; another number of threads only cuts the work otherwise
def _threads() -> int:
    return torch.get_num_threads()


@dataclass(frozen=True)
class _Plan:
    """Sizes, and how tensors are cut: chunks of images and heads, each as (images * windows * heads, n, d) matrices."""

    heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    bytes: int  # logits that are worked on at once

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    def chunks(self, shape: torch.Size, itemsize: int) -> Iterator[tuple[slice, slice]]:
        """(images, heads) so that a chunk's logits fit the cache; heads are cut only where one image alone is too large."""
        batch, height, width = shape[:3]
        per_head = height * width * self.tokens * itemsize
        room = max(self.bytes // per_head, 1)
        heads = min(room, self.heads)
        images = max(room // self.heads, 1)
        for image in range(0, batch, images):
            for head in range(0, self.heads, heads):
                yield slice(image, min(image + images, batch)), slice(head, min(head + heads, self.heads))

    def blocks(self, x: Tensor, parts: int) -> Tensor:
        """A view of (b, h, w, parts * c) as (parts, b, rows, columns, heads, window height, window width, d)."""
        batch, height, width, channels = x.shape
        rows, columns = height // self.window[0], width // self.window[1]
        cut = x.view(batch, rows, self.window[0], columns, self.window[1], parts, self.heads, channels // parts // self.heads)
        return cut.permute(5, 0, 1, 3, 6, 2, 4, 7)

    def take(self, blocks: Tensor, images: slice, heads: slice, dtype: torch.dtype) -> Tensor:
        """One chunk of one part of `blocks`, copied to (images * windows * heads, n, d)."""
        part = blocks[images, :, :, heads]
        return part.to(dtype, memory_format=torch.contiguous_format, copy=True).view(-1, self.tokens, part.shape[-1])

    def put(self, blocks: Tensor, images: slice, heads: slice, value: Tensor) -> None:
        """Write a chunk where `take` reads it."""
        part = blocks[images, :, :, heads]
        part.copy_(value.view(part.shape))

    def mask_(self, logits: Tensor, images: int, rows: int, columns: int) -> None:
        """Add -100 between regions: only the last windows of a shifted axis hold more than one."""
        view = logits.view(images, rows, columns, -1, self.tokens, self.tokens)
        if self.shift[0] and self.shift[1]:
            view[:, -1, :-1] += _region_mask(self.window, (self.shift[0], 0), logits.dtype)
            view[:, :-1, -1] += _region_mask(self.window, (0, self.shift[1]), logits.dtype)
            view[:, -1, -1] += _region_mask(self.window, self.shift, logits.dtype)
        elif self.shift[0]:
            view[:, -1] += _region_mask(self.window, self.shift, logits.dtype)
        elif self.shift[1]:
            view[:, :, -1] += _region_mask(self.window, self.shift, logits.dtype)


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
) -> tuple[Tensor, Tensor]:
    """The attended values, and where `keep` says so the weights of all windows in the order of the chunks."""
    plan = _Plan(heads, (window[0], window[1]), (shift[0], shift[1]), room)
    rolled = _roll(qkv, plan.shift, -1)
    output, kept = _results(qkv, bias, logit_scale, heads, window, shift, room, keep)
    (out_blocks,) = plan.blocks(output, 1).unbind(0)
    start = 0
    with _exact():
        for chunk in _chunks(rolled, logit_scale, plan):
            weights = chunk.weights(bias, kept[start : start + chunk.matrices] if keep else None)
            start += chunk.matrices
            plan.put(out_blocks, chunk.images, chunk.heads, torch.bmm(weights, chunk.v))
    return _roll(output, plan.shift, 1), kept


def _backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    kept: Tensor,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    room: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projection, the bias and the logit scale (empty where there is none)."""
    plan = _Plan(heads, (window[0], window[1]), (shift[0], shift[1]), room)
    rolled, grad_rolled = _roll(qkv, plan.shift, -1), _roll(grad, plan.shift, -1)
    grad_qkv = torch.empty_like(rolled)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    grad_bias = torch.zeros(bias.shape, dtype=wide)
    grad_scale = torch.zeros(heads if logit_scale is not None else 0, dtype=wide)
    (grad_blocks,) = plan.blocks(grad_rolled, 1).unbind(0)
    parts = plan.blocks(grad_qkv, 3).unbind(0)
    start = 0
    with _exact():
        for chunk in _chunks(rolled, logit_scale, plan):
            grad_out = plan.take(grad_blocks, chunk.images, chunk.heads, chunk.v.dtype)
            weights = kept[start : start + chunk.matrices]
            start += chunk.matrices
            for part, gradient in zip(parts, chunk.backward(weights, grad_out, grad_bias, grad_scale), strict=True):
                plan.put(part, chunk.images, chunk.heads, gradient)
    if logit_scale is not None:
        grad_scale = (grad_scale * (logit_scale <= MAX_LOGIT_SCALE)).to(logit_scale.dtype)
    return _roll(grad_qkv, plan.shift, 1), grad_bias.to(bias.dtype, copy=True), grad_scale


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
) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = qkv.shape
    tokens = window[0] * window[1]
    matrices = batch * height * width // tokens * heads if keep else 0
    kept = qkv.new_empty(matrices, tokens, tokens, dtype=_operand_type(qkv.dtype))
    return qkv.new_empty(batch, height, width, channels // 3), kept


def _gradients(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    kept: Tensor,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    room: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_scale = bias.new_empty(0) if logit_scale is None else logit_scale.new_empty(logit_scale.shape)
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape), grad_scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The room is kept too: backward has to cut as forward did, and the number of threads may change in between.
    qkv, bias, logit_scale, *ctx.plan, _ = inputs
    ctx.save_for_backward(qkv, bias, logit_scale, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _kept: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    qkv, bias, logit_scale, kept = ctx.saved_tensors
    grads = torch.ops.simmim_scale.cpu_attention_backward(grad, qkv, bias, logit_scale, kept, *ctx.plan)
    return *grads[:2], None if logit_scale is None else grads[2], None, None, None, None, None


# Operators, so that torch.compile does not break its graph here, nor unrolls the chunks into it.
_PLAN = "int heads, int[] window, int[] shift, int room"
_FORWARD = torch.library.custom_op(
    "simmim_scale::cpu_attention",
    _forward,
    mutates_args=(),
    schema=f"(Tensor qkv, Tensor bias, Tensor? logit_scale, {_PLAN}, bool keep) -> (Tensor, Tensor)",
)
_FORWARD.register_fake(_results)
_FORWARD.register_autograd(_differentiate, setup_context=_keep)
_BACKWARD = torch.library.custom_op(
    "simmim_scale::cpu_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor qkv, Tensor bias, Tensor? logit_scale, Tensor kept, {_PLAN}) -> (Tensor, Tensor, Tensor)",
)
_BACKWARD.register_fake(_gradients)


@dataclass
class _Chunk:
    """Some images and heads. `q` holds unit vectors times the scale, `k` unit vectors (V1: q / sqrt(d), and k itself), in fp32 or
    fp64; `v` is in the type of the products with the weights."""

    plan: _Plan
    images: slice
    heads: slice
    grid: tuple[int, int, int]  # images, rows and columns of windows
    q: Tensor
    k: Tensor
    v: Tensor
    q_factor: Tensor | float  # what the projection's q was multiplied by
    k_factor: Tensor | float
    cosine: bool

    @property
    def matrices(self) -> int:
        return self.q.shape[0]

    def weights(self, bias: Tensor, out: Tensor | None) -> Tensor:
        """Attention weights, (images * windows * heads, n, n), in the type of `v`; written into `out` if given."""
        windows = self.grid[0] * self.grid[1] * self.grid[2]
        own = bias[self.heads].to(self.q.dtype)
        logits = torch.baddbmm(own.expand(windows, *own.shape).flatten(0, 1) if windows > 1 else own, self.q, self.k.mT)
        self.plan.mask_(logits, *self.grid)
        if self.v.dtype == logits.dtype:
            return torch.softmax(logits, dim=-1, out=out)
        torch.softmax(logits, dim=-1, out=logits)  # row by row, so it may overwrite its input
        return logits.to(self.v.dtype) if out is None else out.copy_(logits)

    def backward(self, weights: Tensor, grad_out: Tensor, grad_bias: Tensor, grad_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the projection's q, k, v; those of bias and log-scale are added to the buffers given."""
        grad_v = torch.bmm(weights.mT, grad_out)
        wide = self.q.dtype
        grad_weights = torch.bmm(grad_out.to(wide), self.v.to(wide).mT)
        grad_logits = grad_weights  # overwritten row by row
        torch.ops.aten._softmax_backward_data.out(grad_weights, weights.to(wide), -1, wide, grad_input=grad_logits)
        heads = self.heads.stop - self.heads.start
        grad_bias[self.heads] += grad_logits.view(-1, heads, *grad_logits.shape[1:]).sum(0)
        grad_q, grad_k = torch.bmm(grad_logits, self.k), torch.bmm(grad_logits.mT, self.q)
        if not self.cosine:
            return grad_q.mul_(self.q_factor), grad_k, grad_v
        along_q, along_k = (grad_q * self.q).sum(-1, keepdim=True), (grad_k * self.k).sum(-1, keepdim=True)
        grad_scale[self.heads] += along_q.view(-1, heads, self.plan.tokens).sum((0, 2))
        # q = f * x with f = scale / |x|: the gradient loses its part along x. |q|^2 = scale^2, |k|^2 = 1 (or 0: then f is 0).
        square = self.q.square().sum(-1, keepdim=True).clamp_(min=torch.finfo(self.q.dtype).tiny)
        grad_q = grad_q.addcmul_(self.q, along_q / square, value=-1).mul_(self.q_factor)
        return grad_q, grad_k.addcmul_(self.k, along_k, value=-1).mul_(self.k_factor), grad_v


def _chunks(rolled: Tensor, logit_scale: Tensor | None, plan: _Plan) -> Iterator[_Chunk]:
    wide = torch.promote_types(rolled.dtype, torch.float32)
    blocks = plan.blocks(rolled, 3).unbind(0)
    rows, columns = blocks[0].shape[1:3]
    scale = None if logit_scale is None else logit_scale.to(wide).clamp(max=MAX_LOGIT_SCALE).exp()
    for images, heads in plan.chunks(rolled.shape, wide.itemsize):
        q, k = (plan.take(part, images, heads, wide) for part in blocks[:2])
        v = plan.take(blocks[2], images, heads, _operand_type(rolled.dtype))
        if scale is None:
            q_factor, k_factor = q.shape[-1] ** -0.5, 1.0
            q.mul_(q_factor)
        else:
            q_factor, k_factor = _inverse_norm(q), _inverse_norm(k)
            q_factor.view(-1, heads.stop - heads.start, plan.tokens).mul_(scale[heads, None])
            q.mul_(q_factor)
            k.mul_(k_factor)
        grid = (images.stop - images.start, rows, columns)
        yield _Chunk(plan, images, heads, grid, q, k, v, q_factor, k_factor, scale is not None)


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
