"""What `simmim bench kernels` measures: layers of the published models at 192 px, with the bytes and multiply-adds they need.

Bytes are those that no implementation can avoid: tensors that a pass is given and those that it returns, each once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from simmim_scale.kernels.masked_loss import Layout, Normalization
from simmim_scale.kernels.norm import EPS

HEAD_DIM = 32
# Model -> base channels, window, V2 (cosine attention, post-norm); all at 192 px with patches of 4 (SimMIM table 1).
MODELS = {"swin_b": (128, 6, False), "swin_l": (192, 12, False), "swinv2_h": (352, 12, True)}
SIDES = (48, 24, 12, 6)  # tokens per axis of the four stages
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
HIDDEN = (22, 36)  # patches of 32 pixels that are hidden, and all of them, at 192 px and a ratio of 0.6


class Case(Protocol):
    """One layer at a batch size."""

    op: ClassVar[str]

    @property
    def layer(self) -> str: ...

    @property
    def facts(self) -> dict[str, int]:
        """What dispatch asks for beside type and device."""

    def bytes(self, itemsize: int) -> dict[str, int]:
        """Bytes that must be moved, "forward" and "backward"."""

    def flops(self) -> dict[str, int]:
        """Floating-point operations of matrix products, "forward" and "backward"."""

    def prepare(self, random: Callable[..., Tensor], dtype: torch.dtype) -> "Prepared":
        """Fresh inputs. `random(*shape)` draws normal fp32 numbers on the device."""


@dataclass(frozen=True)
class Prepared:
    """Inputs that get gradients, and how a form of the op is applied to them: it returns all its results."""

    leaves: tuple[Tensor, ...]
    apply: Callable[[Callable[..., Any]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class AttentionCase:
    """Window attention of a stage; shifted where there is more than one window."""

    op: ClassVar[str] = "window_attention"
    model: str
    stage: int
    batch: int
    side: int
    heads: int
    window: int
    shift: int
    cosine: bool

    @property
    def layer(self) -> str:
        return f"{self.model} stage {self.stage}, batch {self.batch}"

    @property
    def facts(self) -> dict[str, int]:
        return {"head_dim": HEAD_DIM, "tokens": self.window**2}

    @property
    def units(self) -> int:
        """Matrices of logits: images * windows * heads."""
        return self.batch * (self.side // self.window) ** 2 * self.heads

    def bytes(self, itemsize: int) -> dict[str, int]:
        """Projection in, output and log-sum-exp out; in backward these and a gradient in, another out."""
        tokens = self.window**2
        values, statistics = self.units * tokens * HEAD_DIM * itemsize, self.units * tokens * 4
        return {"forward": 4 * values + statistics, "backward": 8 * values + statistics}

    def flops(self) -> dict[str, int]:
        """Backward includes the logits once more."""
        product = 2 * self.units * self.window**4 * HEAD_DIM
        return {"forward": 2 * product, "backward": 5 * product}

    def prepare(self, random: Callable[..., Tensor], dtype: torch.dtype) -> Prepared:
        """Projection, bias and, for V2, the logit scale."""
        tokens, channels = self.window**2, self.heads * HEAD_DIM
        qkv = random(self.batch, self.side, self.side, 3 * channels).to(dtype)
        bias = random(self.heads, tokens, tokens)
        scale = torch.full((self.heads,), 2.3, device=qkv.device) if self.cosine else None
        sizes = {"num_heads": self.heads, "window": (self.window,) * 2, "shift": (self.shift,) * 2}
        leaves = (qkv, bias) if scale is None else (qkv, bias, scale)
        return Prepared(leaves, lambda function: (function(qkv, bias, logit_scale=scale, **sizes),))


@dataclass(frozen=True)
class NormCase:
    """The norm with the residual sum beside it, of a stage: `post_norm` (V2) or `pre_norm` (V1), without drop path."""

    op: ClassVar[str] = "norm"
    model: str
    stage: int
    batch: int
    side: int
    width: int
    post: bool

    @property
    def layer(self) -> str:
        return f"{self.model} stage {self.stage}, batch {self.batch}"

    @property
    def facts(self) -> dict[str, int]:
        return {"width": self.width}

    def bytes(self, itemsize: int) -> dict[str, int]:
        """Post: two tensors in and one out, both ways. Pre: the norm is a second result, and its gradient a third input."""
        tensors = 3 if self.post else 4
        moved = tensors * self.batch * self.side**2 * self.width * itemsize
        return {"forward": moved, "backward": moved}

    def flops(self) -> dict[str, int]:
        """No matrix products."""
        return {"forward": 0, "backward": 0}

    def prepare(self, random: Callable[..., Tensor], dtype: torch.dtype) -> Prepared:
        """Branch, residual, weight, bias; results are the sum and, for V1, its norm."""
        shape = (self.batch, self.side, self.side, self.width)
        branch, residual, weight, bias = (random(*sizes).to(dtype) for sizes in (shape, shape, (self.width,), (self.width,)))

        def apply(function: Callable[..., Any]) -> tuple[Tensor, ...]:
            results = function(branch, residual, None, weight, bias, eps=EPS)
            return results if isinstance(results, tuple) else (results,)

        return Prepared((branch, residual, weight, bias), apply)


@dataclass(frozen=True)
class LossCase:
    """The l1 loss on the hidden patches of 192x192 RGB pixels, as stored, with cells and patches of 32 pixels."""

    op: ClassVar[str] = "masked_loss"
    batch: int

    @property
    def layer(self) -> str:
        return f"192 px, batch {self.batch}"

    @property
    def facts(self) -> dict[str, int]:
        return {}

    @property
    def numbers(self) -> int:
        return self.batch * HIDDEN[0] * 3 * 32**2

    def bytes(self, itemsize: int) -> dict[str, int]:
        """Prediction (and one byte a pixel) in; its gradient out."""
        return {"forward": self.numbers * (itemsize + 1), "backward": self.numbers * itemsize}

    def flops(self) -> dict[str, int]:
        """No matrix products."""
        return {"forward": 0, "backward": 0}

    def prepare(self, random: Callable[..., Tensor], dtype: torch.dtype) -> Prepared:
        """The prediction; the result is the sum of each image."""
        prediction = random(self.batch, HIDDEN[0], 3 * 32**2).to(dtype)
        device, generator = prediction.device, torch.Generator().manual_seed(self.batch)
        image = torch.randint(256, (self.batch, 192, 192, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
        tokens = torch.rand(self.batch, HIDDEN[1], generator=generator).argsort(1)[:, : HIDDEN[0]].sort(1).values
        mask = torch.zeros(self.batch, HIDDEN[1], dtype=torch.bool).scatter(1, tokens, True).view(self.batch, 6, 6)
        mean, std = (torch.tensor(numbers, device=device) for numbers in (MEAN, STD))
        arguments = {
            "layout": Layout(grid=(6, 6), patch=32, cell=32),
            "tokens": tokens.to(device),
            "flip": None,
            "normalization": Normalization(mean, std),
            "loss": "l1",
            "beta": 1.0,
        }
        image, mask = image.to(device), mask.to(device)
        return Prepared((prediction,), lambda function: (function(prediction, image, mask, **arguments),))


OPS = (AttentionCase.op, NormCase.op, LossCase.op)


def make_cases(
    ops: Iterable[str], models: Iterable[str], batches: Iterable[int], stages: Iterable[int] = (1, 2, 3, 4)
) -> list[Case]:
    """All layers of the ops, models and stages (from 1) at each batch size.

    Raises:
        ValueError: unknown op, model or stage.
    """
    ops, models, batches, stages = list(ops), list(models), list(batches), list(stages)
    for what, given, known in (("op", ops, OPS), ("model", models, MODELS), ("stage", stages, (1, 2, 3, 4))):
        for name in given:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}. Known: {', '.join(map(str, known))}.")
    layers = [(model, batch, stage) for model in models for batch in batches for stage in stages]
    found: list[Case] = []
    for op in ops:
        if op == LossCase.op:
            found += [LossCase(batch) for batch in batches]
        else:
            found += [_attention(*layer) if op == AttentionCase.op else _norm(*layer) for layer in layers]
    return found


def _attention(model: str, batch: int, stage: int) -> AttentionCase:
    channels, window, cosine = MODELS[model]
    side, heads = SIDES[stage - 1], channels * 2 ** (stage - 1) // HEAD_DIM
    own = min(window, side)
    return AttentionCase(model, stage, batch, side, heads, own, own // 2 if side > own else 0, cosine)


def _norm(model: str, batch: int, stage: int) -> NormCase:
    channels, _, post = MODELS[model]
    return NormCase(model, stage, batch, SIDES[stage - 1], channels * 2 ** (stage - 1), post)
