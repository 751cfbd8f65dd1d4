"""How large a model is: parameters, and multiply-adds of one image's forward pass (the "FLOPs" of S table 1)."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simmim_scale.models.initialization import shape_of


def count_parameters(module: nn.Module) -> int:
    """Elements of all parameters, whole also where ZeRO-3 holds only a piece here."""
    return sum(torch.Size(shape_of(parameter)).numel() for parameter in module.parameters())


def multiply_adds(backbone: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-adds of the backbone's forward pass for one image: matrix products and convolutions, nothing elementwise.

    Counted by running a copy on the meta device, so it costs no memory and no arithmetic, and measures the model that runs.

    Args:
        image_size: (height, width) in pixels.
    """
    on_meta = copy.deepcopy(backbone).to("meta") if not _is_meta(backbone) else backbone
    image = torch.empty(1, backbone.in_chans, *image_size, device="meta", dtype=next(on_meta.parameters()).dtype)
    was_training = on_meta.training
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        on_meta.eval()(image)
    on_meta.train(was_training)
    return counter.get_total_flops() // 2  # the counter counts a multiply-add as two


def _is_meta(module: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in module.parameters())
