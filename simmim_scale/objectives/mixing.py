"""Mixup and cutmix on the device, from the plan that the loader made (`data/mixing.py`).

Letters: b batch, c channels, h w height and width in pixels, k classes.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax


def mix_images(image: Float[Tensor, "b c h w"], plan: Mapping[str, Tensor]) -> Float[Tensor, "b c h w"]:
    """Normalised images, each blended with its partner (mixup) or covered by it inside a box (cutmix).

    Args:
        plan: "partner" (b,) rows, "mix_lam" (b,) weight of the image itself, "mix_box" (b, 4) top, left, bottom, right; an empty
            box means mixup.
    """
    partner = image[plan["partner"]]
    inside = box_mask(plan["mix_box"], image.shape[2], image.shape[3])
    cut = (plan["mix_box"][:, 2] > plan["mix_box"][:, 0]) & (plan["mix_box"][:, 3] > plan["mix_box"][:, 1])
    lam = torch.where(cut, 1.0, plan["mix_lam"]).to(image.dtype)[:, None, None, None]
    return torch.where(inside, partner, image * lam + partner * (1 - lam))


def box_mask(box: Int[Tensor, "b 4"], height: int, width: int) -> Bool[Tensor, "b 1 h w"]:
    """True inside each box."""
    rows = torch.arange(height, device=box.device)
    columns = torch.arange(width, device=box.device)
    top, left, bottom, right = box[:, :, None].unbind(1)
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def smoothed_cross_entropy(
    logits: Float[Tensor, "b k"], label: Int[Tensor, " b"], plan: Mapping[str, Tensor], *, smoothing: float
) -> Float[Tensor, " b"]:
    """Cross-entropy of every sample against its own and its partner's class, weighted by lambda, with label smoothing; fp32.

    Target: (1 - smoothing) (lam onehot(label) + (1 - lam) onehot(partner's)) + smoothing / k, never laid out in memory.

    Args:
        plan: as for `mix_images`; empty: nothing is mixed.
    """
    log_p = log_softmax(logits.float(), dim=-1)
    hit = log_p.gather(1, label[:, None])[:, 0]
    if "partner" in plan:
        other = log_p.gather(1, label[plan["partner"]][:, None])[:, 0]
        lam = plan["mix_lam"].float()
        hit = lam * hit + (1 - lam) * other
    return -(1 - smoothing) * hit - smoothing * log_p.mean(dim=-1)
