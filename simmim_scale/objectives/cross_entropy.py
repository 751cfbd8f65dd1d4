"""Cross-entropy of hidden pixels over many classes, a few tokens at a time: not all logits ever exist at once.

The logits of a token are groups x classes x pixels (three colours x 256 bins x 1,024 pixels: 786,432 numbers), so they are made
from the token and the last linear map where they are needed, in forward and again in backward.
Letters: n tokens, d their width, g groups, q classes, p pixels of a token, l = g * q * p logits of a token, r tokens at hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Classes:
    """How the logits of a token are laid out, and the most bytes of fp32 logits to hold at once."""

    groups: int
    count: int
    chunk_bytes: int

    def cut(self, tokens: int, logits: int) -> Iterator[slice]:
        """Tokens to work on at once, at least one."""
        room = max(1, self.chunk_bytes // (4 * logits))
        return (slice(start, start + room) for start in range(0, tokens, room))


def hidden_cross_entropy(
    inputs: Float[Tensor, "n d"],
    weight: Float[Tensor, "l d"] | None,
    bias: Float[Tensor, " l"] | None,
    labels: Int[Tensor, "n g p"],
    hidden: Bool[Tensor, "n p"],
    classes: Classes,
) -> Float[Tensor, " n"]:
    """Sum over a token's hidden pixels and groups of -log softmax(logits)[label]; differentiable in inputs, weight and bias.

    Args:
        weight: the logits are inputs @ weight.T + bias, in the order (group, class, pixel); None: the inputs are the logits.

    Returns:
        (n,) fp32 (fp64 for fp64 inputs). Softmax and sums are in that type; the weight's gradient is summed over chunks in it.
    """
    return _HiddenCrossEntropy.apply(inputs, weight, bias, labels, hidden, classes)


def most_likely(
    inputs: Float[Tensor, "n d"], weight: Float[Tensor, "l d"] | None, bias: Float[Tensor, " l"] | None, classes: Classes
) -> Int[Tensor, "n g p"]:
    """The class with the largest logit of every group and pixel."""
    length = inputs.shape[1] if weight is None else weight.shape[0]
    parts = [_logits(inputs[part], weight, bias, classes).argmax(2) for part in classes.cut(len(inputs), length)]
    return torch.cat(parts)


def _logits(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, classes: Classes) -> Float[Tensor, "r g q p"]:
    flat = inputs if weight is None else F.linear(inputs, weight, bias)
    return flat.to(torch.promote_types(flat.dtype, torch.float32)).view(len(flat), classes.groups, classes.count, -1)


class _HiddenCrossEntropy(torch.autograd.Function):
    """Keeps the inputs and one number per group and pixel."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        hidden: Tensor,
        classes: Classes,
    ) -> Tensor:
        length = inputs.shape[1] if weight is None else weight.shape[0]
        exact = torch.promote_types(inputs.dtype, torch.float32)
        sums = torch.empty(len(inputs), dtype=exact, device=inputs.device)
        totals = torch.empty(labels.shape, dtype=exact, device=inputs.device)
        for part in classes.cut(len(inputs), length):
            logits = _logits(inputs[part], weight, bias, classes)
            totals[part] = logits.logsumexp(2)
            chosen = logits.gather(2, labels[part].long()[:, :, None])[:, :, 0]
            sums[part] = (totals[part] - chosen).masked_fill(~hidden[part][:, None], 0.0).sum((1, 2))
        ctx.classes, ctx.length = classes, length
        ctx.save_for_backward(inputs, weight, bias, labels, hidden, totals)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, labels, hidden, totals = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_inputs = torch.empty_like(inputs) if wants[0] else None
        grad_weight = None if weight is None or not wants[1] else torch.zeros_like(weight, dtype=totals.dtype)
        grad_bias = None if bias is None or not wants[2] else torch.zeros_like(bias, dtype=totals.dtype)
        for part in ctx.classes.cut(len(inputs), ctx.length):
            slope = (_logits(inputs[part], weight, bias, ctx.classes) - totals[part][:, :, None]).exp_()
            true = labels[part].long()[:, :, None]
            slope.scatter_add_(2, true, torch.full_like(true, -1, dtype=slope.dtype))
            slope *= (hidden[part] * grad_sums[part][:, None])[:, None, None]
            slope = slope.flatten(1)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(inputs.dtype)
            if grad_inputs is not None:
                grad_inputs[part] = slope if weight is None else slope @ weight
            if grad_weight is not None:
                grad_weight += slope.t() @ inputs[part]
        cast = lambda gradient, like: None if gradient is None else gradient.to(like.dtype)  # noqa: E731
        return grad_inputs, cast(grad_weight, weight), cast(grad_bias, bias), None, None, None
