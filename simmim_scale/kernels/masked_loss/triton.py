"""The masked loss on a GPU by one Triton kernel: error and gradient in one pass, the picture read where it lies.

A program takes one patch and stores its own sum, so nothing is added atomically: the same input gives the same digits.
`TRITON_INTERPRET=1` runs the same kernel on a CPU, slowly, for tests.
"""

import contextlib
from typing import Any

import torch
import triton
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from simmim_scale.kernels.masked_loss import LOSSES, Layout, Normalization
from simmim_scale.kernels.masked_loss.triton_kernel import masked_loss_kernel

LARGEST_BLOCK = 512  # numbers of a patch that a program works on at once: 4 a thread


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """NVIDIA GPUs, fp32 and the half precisions."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, got {dtype}"
    if device.type == "cuda" and torch.version.hip:
        return "it was compiled for NVIDIA GPUs only"
    if device.type == "cuda" or (device.type == "cpu" and knobs.runtime.interpret):
        return None
    return f"it runs on an NVIDIA GPU, got {device.type}"


def masked_loss(
    prediction: Float[Tensor, "b k l"],
    image: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b mh mw"],
    *,
    layout: Layout,
    tokens: Int[Tensor, "b k"] | None,
    flip: Bool[Tensor, " b"] | None,
    normalization: Normalization,
    loss: str,
    beta: float,
) -> Float[Tensor, " b"]:
    """See the contract in `kernels/masked_loss/__init__.py`."""
    keep = torch.is_grad_enabled() and prediction.requires_grad
    return _MaskedLoss.apply(prediction, image, mask, layout, tokens, flip, normalization, (loss, beta), keep)


def kernel_constants(*, channels: int, patch: int, loss: str, normalization: Normalization, **present: bool) -> dict[str, Any]:
    """Compile-time arguments; `present`: TOKENS_GIVEN, FLIPPED, KEEP."""
    return {
        "C": channels,
        "S": patch,
        "LOSS": LOSSES.index(loss),
        "STORED": normalization.mean is not None,
        "LOCAL": normalization.local_mean is not None,
        "BLOCK": min(LARGEST_BLOCK, triton.next_power_of_2(channels * patch**2)),
        "num_warps": 4,
        **present,
    }


class _MaskedLoss(torch.autograd.Function):
    """Keeps the gradient of each image's sum, in the prediction's type."""

    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        image: Tensor,
        mask: Tensor,
        layout: Layout,
        tokens: Tensor | None,
        flip: Tensor | None,
        normalization: Normalization,
        loss: tuple[str, float],
        keep: bool,
    ) -> Tensor:
        prediction, mask = prediction.contiguous(), mask.contiguous()
        batch, count = prediction.shape[:2]
        sums = torch.empty(batch, count, dtype=torch.float32, device=prediction.device)
        gradient = torch.empty_like(prediction) if keep else sums
        local = [part if part is None else part.contiguous() for part in (normalization.local_mean, normalization.local_std)]
        optional = [tokens, flip, normalization.mean, normalization.std, *local]
        constants = kernel_constants(
            channels=image.shape[1],
            patch=layout.patch,
            loss=loss[0],
            normalization=normalization,
            TOKENS_GIVEN=tokens is not None,
            FLIPPED=flip is not None,
            KEEP=keep,
        )
        with _on(prediction.device):
            masked_loss_kernel[(batch * count,)](
                prediction,
                image,
                mask.view(torch.uint8),
                *(sums if part is None else _plain(part) for part in optional),
                sums,
                gradient,
                *(count, layout.grid[1], image.shape[2], image.shape[3], mask.shape[1], mask.shape[2], layout.cell),
                *image.stride(),
                loss[1],
                **constants,
            )
        if keep:
            ctx.save_for_backward(gradient)
        return sums.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_errors: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_errors[:, None, None]).to(gradient.dtype), *(None,) * 8


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, and bytes in place of booleans."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton starts kernels on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
