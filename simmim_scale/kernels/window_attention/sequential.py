"""Window attention a few windows at a time, in forward and again in backward: SwinV2's "sequential self-attention computation".

For forms that hold n x n matrices of every window at once (V2 section 3.4, on images of 1,536 pixels).
Letters: b batch, h w tokens per axis, n tokens of one window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# attention of an image of tokens, as the contract has it, without the number of heads and the window
Attend = Callable[..., Tensor]


def attend_in_turn(
    attend: Attend,
    qkv: Float[Tensor, "b h w c3"],
    bias: Float[Tensor, "heads n n"],
    logit_scale: Float[Tensor, "heads"] | None,
    *,
    window: tuple[int, int],
    shift: tuple[int, int],
    rows: int,
) -> Float[Tensor, "b h w c"]:
    """`attend` on at most `rows` rows of windows of one image at a time; nothing n x n outlives its turn.

    Each turn is computed again in backward. Windows do not depend on each other: values, and on images of several windows the
    gradient of `qkv`, have the bits of all windows at once. The gradients of `bias` and `logit_scale` are summed over turns in a
    fixed order in fp32 (fp64 for fp64), all at once in another: in fp32 they agree within 3e-7 and, since most of the latter
    cancels, 5e-6 of their norms.

    Args:
        attend: (qkv, bias, logit_scale, shift) -> attended values.
        rows: of windows, at least 1.
    """
    return _InTurn.apply(qkv, bias, logit_scale, attend, _Turns(qkv.shape[1] // window[0], window[0], shift, rows))


@dataclass(frozen=True)
class _Turns:
    """How an image is cut: `count` rows of windows, each `height` tokens high. Rows are rolled by the shift beforehand."""

    count: int
    height: int
    shift: tuple[int, int]
    rows: int

    def __call__(self, images: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
        """(image, tokens of the vertical axis, shift inside of the cut).

        A row of windows is an image of its own, shifted along its width alone; only the last one holds tokens of both ends.
        """
        plain = self.count - bool(self.shift[0])
        for image in range(images):
            for first in range(0, plain, self.rows):
                last = min(first + self.rows, plain)
                yield slice(image, image + 1), slice(first * self.height, last * self.height), (0, self.shift[1])
            if self.shift[0]:
                yield slice(image, image + 1), slice(plain * self.height, None), self.shift


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, attend: Attend, turns: _Turns) -> Tensor:
        ctx.save_for_backward(qkv, bias, logit_scale)
        ctx.attend, ctx.turns = attend, turns
        rolled = _roll_rows(qkv, turns.shift, -1)
        output = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
        for image, tokens, shift in turns(qkv.shape[0]):
            part = _roll_rows(rolled[image, tokens], shift, 1)
            output[image, tokens] = _roll_rows(attend(part, bias, logit_scale, shift), shift, -1)
        return _roll_rows(output, turns.shift, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, logit_scale = ctx.saved_tensors
        turns, needed = ctx.turns, ctx.needs_input_grad[:3]
        rolled, grad_rolled = (_roll_rows(x, turns.shift, -1) for x in (qkv, grad))
        shared = [
            None if x is None else _leaf(x.to(_wide(x)), need) for x, need in zip((bias, logit_scale), needed[1:], strict=True)
        ]
        grad_qkv = torch.empty_like(rolled)
        sums = [torch.zeros_like(x) if x is not None and x.requires_grad else None for x in shared]
        for image, tokens, shift in turns(qkv.shape[0]):
            part = _leaf(_roll_rows(rolled[image, tokens], shift, 1), needed[0])
            wanted = [x for x in (part, *shared) if x is not None and x.requires_grad]
            with torch.enable_grad():
                output = ctx.attend(part, *shared, shift)
            found = list(torch.autograd.grad(output, wanted, _roll_rows(grad_rolled[image, tokens], shift, 1)))
            if needed[0]:
                grad_qkv[image, tokens] = _roll_rows(found.pop(0), shift, -1)
            for total in sums:
                if total is not None:
                    total += found.pop(0)
        given = [None if total is None else total.to(x.dtype) for total, x in zip(sums, (bias, logit_scale), strict=True)]
        return _roll_rows(grad_qkv, turns.shift, 1) if needed[0] else None, *given, None, None


def _roll_rows(x: Tensor, shift: tuple[int, int], sign: int) -> Tensor:
    """x rolled along its height. `attend` rolls what it gets: the last row of windows, rolled already, is rolled back for it."""
    return torch.roll(x, sign * shift[0], dims=1) if shift[0] else x


def _leaf(x: Tensor, needs_grad: bool) -> Tensor:
    return x.detach().requires_grad_(needs_grad)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
