"""How large a model is: parameters, and multiply-adds of one image's forward pass (the "FLOPs" of S table 1)."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simmim_scale.models.initialization import shape_of


def count_parameters(module: nn.Module) -> int:
    """Elements of all parameters, whole also where ZeRO-3 holds only a piece here."""
    return sum(torch.Size(shape_of(parameter)).numel() for parameter in module.parameters())


def multiply_adds(backbone: nn.Module, image_size: tuple[int, int], *, in_chans: int | None = None) -> int:
    """Multiply-adds of the backbone's forward pass for one image: matrix products and convolutions, nothing elementwise.

    Counted by running a twin on the meta device, so it costs no memory and no arithmetic, and measures the model that runs.

    Args:
        image_size: (height, width) in pixels.
        in_chans: channels of the image; None: the backbone's attribute of that name.
    """
    twin = _on_meta(backbone)
    channels = backbone.in_chans if in_chans is None else in_chans
    image = torch.empty(1, channels, *image_size, device="meta", dtype=next(twin.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin.eval()
        twin.encode(twin.embed(image))  # what every backbone has; a `forward` of its own it need not have
    return counter.get_total_flops() // 2  # the counter counts a multiply-add as two


def head_multiply_adds(head: nn.Module, features: torch.Tensor) -> int:
    """Multiply-adds of a head's forward pass on `features` (of the meta device, of one image)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _on_meta(head)(features)
    return counter.get_total_flops() // 2


def _on_meta(module: nn.Module) -> nn.Module:
    # The memo hands deepcopy a shapeless twin for every tensor, so that not even a copy of the weights is made.
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty(shape_of(parameter), dtype=parameter.dtype, device="meta"))
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)
