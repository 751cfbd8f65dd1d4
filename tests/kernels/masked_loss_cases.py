"""Inputs for the masked loss, the published formula over whole pictures, and a program that runs Triton's form on them.

As a program: started by test_masked_loss_triton.py, since TRITON_INTERPRET must be set before Triton is imported. Prints one JSON
object per case. New tensors are full of NaN, so what a kernel does not write is seen.
"""

import json
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim_scale.kernels.masked_loss import Layout, Normalization, masked_loss

TYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Sizes in pixels; `cell` per unit of the mask; `chosen` tokens of each image, 0: all."""

    size: tuple[int, int] = (16, 24)
    patch: int = 8
    cell: int = 8
    channels: int = 3
    loss: str = "l1"
    beta: float = 1.0
    stored: bool = True
    flip: bool = True
    local: bool = False
    chosen: int = 0
    batch: int = 2
    channels_last: bool = False


CASES = {
    "published": Case(),
    "no flip, float pictures": Case(stored=False, flip=False),
    "channels last": Case(channels_last=True),
    "cells smaller than the patch": Case(cell=2),
    "cells larger than the patch": Case(size=(32, 32), cell=16),
    "the patch overhangs the picture": Case(size=(13, 22), cell=4),
    "chosen tokens": Case(chosen=4),
    "chosen tokens, small cells": Case(chosen=3, cell=4, loss="l2"),
    "smooth l1": Case(loss="smooth_l1", beta=0.5),
    "l2, one channel": Case(loss="l2", channels=1),
    "patch of one pixel": Case(size=(6, 5), patch=1, cell=2),
    "normalised by the surroundings": Case(local=True),
    "normalised, chosen, smooth, five channels": Case(local=True, chosen=2, loss="smooth_l1", channels=5, stored=False),
    "published patch": Case(size=(64, 32), patch=32, cell=32, chosen=1, batch=1),
}


@dataclass(frozen=True)
class Inputs:
    """Arguments of the loss and the weight of each image's sum."""

    prediction: Tensor
    image: Tensor
    mask: Tensor
    layout: Layout
    tokens: Tensor | None
    flip: Tensor | None
    normalization: Normalization
    weight: Tensor


def make_inputs(case: Case) -> Inputs:
    """A function of the case alone."""
    generator = torch.Generator().manual_seed(len(repr(case)))
    height, width = case.size
    rows, columns = -(-height // case.patch), -(-width // case.patch)
    image = torch.randint(0, 256, (case.batch, case.channels, height, width), dtype=torch.uint8, generator=generator)
    mean, std = torch.linspace(0.3, 0.5, case.channels), torch.linspace(0.2, 0.3, case.channels)
    if not case.stored:
        image, mean, std = torch.randn(image.shape, generator=generator), None, None
    if case.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    mask = torch.rand(case.batch, -(-height // case.cell), -(-width // case.cell), generator=generator) < 0.6
    local = {}
    if case.local:
        local["local_mean"] = torch.randn(image.shape, generator=generator, dtype=torch.float64)
        local["local_std"] = torch.rand(image.shape, generator=generator, dtype=torch.float64) + 0.1
    tokens, count = None, rows * columns
    if case.chosen:
        count = case.chosen
        tokens = torch.stack([torch.randperm(rows * columns, generator=generator)[:count] for _ in range(case.batch)])
    prediction = torch.randn(case.batch, count, case.channels * case.patch**2, generator=generator, dtype=torch.float64)
    return Inputs(
        prediction=prediction.half().double(),
        image=image,
        mask=mask,
        layout=Layout((rows, columns), case.patch, case.cell),
        tokens=tokens,
        flip=torch.arange(case.batch) % 2 == 0 if case.flip else None,
        normalization=Normalization(mean=mean, std=std, **local),
        weight=torch.rand(case.batch, generator=generator, dtype=torch.float64) + 0.5,
    )


def published(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(b,) sums and the prediction's gradient of their weighted total in fp64: pixel shuffle and products with the mask."""
    prediction = inputs.prediction.clone().requires_grad_()
    (rows, columns), (height, width) = inputs.layout.grid, case.size
    grid = prediction.new_zeros(case.batch, rows * columns, prediction.shape[2])
    tokens = torch.arange(rows * columns).expand(case.batch, -1) if inputs.tokens is None else inputs.tokens
    grid = grid.scatter(1, tokens[..., None].expand_as(prediction), prediction)
    predicted = F.pixel_shuffle(grid.view(case.batch, rows, columns, -1).permute(0, 3, 1, 2), case.patch)[..., :height, :width]
    image = (
        inputs.image if inputs.flip is None else torch.where(inputs.flip[:, None, None, None], inputs.image.flip(3), inputs.image)
    )
    target, norm = image.double(), inputs.normalization
    if norm.mean is not None:
        target = (target / 255 - norm.mean.double().view(-1, 1, 1)) / norm.std.double().view(-1, 1, 1)
    if norm.local_mean is not None:
        target = (target - norm.local_mean) / norm.local_std
    mask = inputs.mask.repeat_interleave(case.cell, 1).repeat_interleave(case.cell, 2)[:, None, :height, :width]
    given = torch.zeros(case.batch, rows * columns, dtype=torch.bool).scatter(1, tokens, True).view(case.batch, rows, columns)
    given = given.repeat_interleave(case.patch, 1).repeat_interleave(case.patch, 2)[:, None, :height, :width]
    error = {"l1": (predicted - target).abs(), "l2": (predicted - target) ** 2}.get(case.loss)
    if error is None:
        error = F.huber_loss(predicted, target, reduction="none", delta=case.beta) / case.beta
    sums = (error * (mask & given)).sum((1, 2, 3))
    (gradient,) = torch.autograd.grad((sums * inputs.weight).sum(), prediction)
    return sums.detach(), gradient


def run(case: Case, inputs: Inputs, implementation: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The same by an implementation."""
    move = lambda part: part if part is None else part.to(device)  # noqa: E731
    prediction = inputs.prediction.to(device, dtype).requires_grad_()
    norm = inputs.normalization
    sums = masked_loss(
        prediction,
        move(inputs.image),
        move(inputs.mask),
        layout=inputs.layout,
        tokens=move(inputs.tokens),
        flip=move(inputs.flip),
        normalization=Normalization(move(norm.mean), move(norm.std), move(norm.local_mean), move(norm.local_std)),
        loss=case.loss,
        beta=case.beta,
        implementation=implementation,
    )
    (gradient,) = torch.autograd.grad((sums * inputs.weight.to(sums)).sum(), prediction)
    return sums.detach().cpu(), gradient.cpu()


def errors(case: Case, implementation: str, dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """Relative errors of the sums and of the gradient."""
    inputs = make_inputs(case)
    pairs = zip(run(case, inputs, implementation, dtype, device), published(case, inputs), strict=True)
    return tuple(float((got.double() - exact).norm() / exact.norm()) for got, exact in pairs)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for name, case in CASES.items():
        found = {dtype: errors(case, "triton", TYPES[dtype]) for dtype in ("float32", "float16")}
        sys.stdout.write(json.dumps({"name": name, **found}) + "\n")


if __name__ == "__main__":
    main()
