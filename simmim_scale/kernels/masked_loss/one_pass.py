"""The masked loss in PyTorch in one pass: error and gradient together, on a CPU as many patches at a time as fit the cache.

Letters as in the contract; n = patches at hand.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from simmim_scale.kernels.masked_loss import Layout, Normalization
from simmim_scale.kernels.masked_loss.patches import Targets, hidden_pixels, places

CHUNK_NUMBERS = 1 << 18  # numbers per thread that a CPU works on at once: about the second-level cache of a core


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """It runs everywhere, in every floating-point type."""
    return None if dtype.is_floating_point else f"it needs a floating-point type, got {dtype}"


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
    targets = Targets(image, layout, flip, normalization)
    where = places(tokens, batch=len(image), layout=layout, device=prediction.device)
    hidden = hidden_pixels(mask, layout, size=(image.shape[2], image.shape[3]))
    return _OnePass.apply(prediction, targets, hidden, where, (loss, beta), keep)


class _OnePass(torch.autograd.Function):
    """Keeps the gradient of each image's sum, in the prediction's type, instead of what it would take to compute it later."""

    @staticmethod
    def forward(
        ctx: Any,
        prediction: Tensor,
        targets: Targets,
        hidden: Tensor,
        where: tuple[Tensor, Tensor, Tensor],
        loss: tuple[str, float],
        keep: bool,
    ) -> Tensor:
        batch, count, numbers = prediction.shape
        flat = prediction.reshape(-1, numbers)
        exact = torch.promote_types(prediction.dtype, torch.float32)
        errors = torch.empty(len(flat), dtype=exact, device=flat.device)
        gradient = torch.empty_like(flat) if keep else None
        for part in _chunks(len(flat), numbers, flat.device):
            place = tuple(index[part] for index in where)
            visible = ~hidden[place].expand(-1, targets.image.shape[3], -1, -1).reshape(-1, numbers)
            difference = (flat[part].to(exact) - targets.take(*place)).masked_fill_(visible, 0.0)
            errors[part] = _error(difference, *loss).sum(1)
            if keep:
                gradient[part] = _slope_(difference, *loss)
        if keep:
            ctx.save_for_backward(gradient.view(batch, count, numbers))
        return errors.view(batch, count).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_errors: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_errors[:, None, None]).to(gradient.dtype), None, None, None, None, None


def _chunks(count: int, numbers: int, device: torch.device) -> list[slice]:
    """Patches to work on at once: on a CPU as many as fit the cache, elsewhere all."""
    room = max(1, CHUNK_NUMBERS * torch.get_num_threads() // numbers) if device.type == "cpu" else count
    return [slice(start, min(start + room, count)) for start in range(0, count, max(1, room))]


def _error(difference: Tensor, loss: str, beta: float) -> Tensor:
    if loss == "l2":
        return difference.square()
    size = difference.abs()
    return size if loss == "l1" else torch.where(size < beta, size.square() / (2 * beta), size - beta / 2)


def _slope_(difference: Tensor, loss: str, beta: float) -> Tensor:
    """The derivative of `_error`, in place of the difference."""
    if loss == "l2":
        return difference.mul_(2)
    return difference.sign_() if loss == "l1" else difference.div_(beta).clamp_(-1, 1)
