"""A module that is small enough to train 20 steps in a fraction of a second, its data, and a plain PyTorch reference."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

WIDTH = 12
GLOBAL_BATCH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 3 * WIDTH)
        self.fc2 = nn.Linear(3 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))  # owned by the block itself: gathered by the block's own hooks

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(self.fc2(torch.nn.functional.gelu(self.fc1(x))))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def checkpointable_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Standin(nn.Module):
    """Mean absolute error of a residual MLP, so that an infinite target gives an infinite loss but finite gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("offset", torch.full((WIDTH,), 0.25))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"].to(self.head.weight.dtype)
        prediction = self.head(self.backbone(x)).float() + self.offset.float()
        return {"loss": (prediction - batch["y"]).abs().mean() * batch.get("factor", torch.ones(1)).max()}


def build() -> Standin:
    """The same weights for every stage and world size."""
    module = Standin()
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        with _gathered(parameter):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            value = torch.randn(shape, generator=generator) * 0.3
            if parameter.numel():
                parameter.data.copy_(value)
    return module


def _gathered(parameter: nn.Parameter):
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def global_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, WIDTH, generator=generator)
    return {"x": x, "y": 2 * x.flip(1) - 1}


def micro_batches(batch: dict[str, Tensor], rank: int, world_size: int, accumulation: int) -> Iterator[dict[str, Tensor]]:
    """This rank's share, dealt as the contract of the data stream says: round a of rank r."""
    micro = GLOBAL_BATCH // world_size // accumulation
    for round_ in range(accumulation):
        start = (round_ * world_size + rank) * micro
        yield {name: value[start : start + micro] for name, value in batch.items()}


def lr_at(step: int) -> float:
    return 5e-3 * min(1.0, (step + 1) / 5) * (0.1 if step >= 15 else 1.0)


def reference_losses(num_steps: int, clip: float) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of plain PyTorch on whole batches: no engine code, AdamW written out."""
    module = build()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in module.named_parameters()}
    losses, norms = [], []
    for step in range(num_steps):
        loss = module(global_batch(step))["loss"]
        module.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters()))
        for name, parameter in module.named_parameters():
            _adamw(name, parameter, moments[name], step, min(1.0, clip / (norm + 1e-6)))
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms


@torch.no_grad()
def _adamw(name: str, parameter: nn.Parameter, moments: tuple[Tensor, Tensor], step: int, factor: float) -> None:
    lr, decay = lr_at(step), 0.05 if name.endswith("weight") and "norm" not in name else 0.0
    first, second = moments
    gradient = parameter.grad * factor
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    parameter.mul_(1 - lr * decay)
    root = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
    parameter.sub_(lr * (first / (1 - 0.9 ** (step + 1))) / root)
