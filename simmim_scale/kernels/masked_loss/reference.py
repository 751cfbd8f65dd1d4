"""The masked loss in plain PyTorch, gradient by autograd: what the other forms are held against."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from simmim_scale.kernels.masked_loss import Layout, Normalization
from simmim_scale.kernels.masked_loss.patches import Targets, hidden_pixels, places


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
    batch, count, numbers = prediction.shape
    where = places(tokens, batch=batch, layout=layout, device=prediction.device)
    target = Targets(image, layout, flip, normalization).take(*where).view(batch, count, numbers)
    hidden = hidden_pixels(mask, layout, size=(image.shape[2], image.shape[3]))[where]
    hidden = hidden.expand(-1, image.shape[1], -1, -1).reshape(batch, count, numbers)
    exact = torch.promote_types(prediction.dtype, torch.float32)
    error = pointwise(prediction.to(exact), target.to(exact), loss=loss, beta=beta)
    return error.masked_fill(~hidden, 0.0).sum(2).sum(1)


def pointwise(prediction: Tensor, target: Tensor, *, loss: str, beta: float) -> Tensor:
    """The error of every number."""
    if loss == "l1":
        return F.l1_loss(prediction, target, reduction="none")
    if loss == "l2":
        return F.mse_loss(prediction, target, reduction="none")
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
