"""Reading and writing a module's parameters whether they are whole, partitioned by ZeRO-3, or on the meta device.

`full_shape` and `assign` are used by initialisation and by the loading of weights; deepspeed is imported only for partitioned
ones.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter; under ZeRO-3 the tensor itself is empty and DeepSpeed keeps the shape in `ds_shape`."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Tensor) -> bool:
    """True for a parameter that ZeRO-3 holds in pieces."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager:
    """Context in which the parameters are whole; what rank 0 writes into them is kept (and sent to every rank) on leaving."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)


def assign(parameter: Tensor, value: Tensor) -> None:
    """Write `value` (same full shape, any dtype and device) into a parameter or buffer; every rank must call it alike.

    A parameter on the meta device has no storage and stays as it is.
    """
    expected = full_shape(parameter)
    if value.shape != expected:
        raise ValueError(f"cannot write a tensor of shape {tuple(value.shape)} into a parameter of shape {tuple(expected)}.")
    if parameter.is_meta:
        return
    with torch.no_grad(), gathered([parameter]):
        # A rank that is not the modifier may see the gathered tensor too; writing the same value there does no harm.
        parameter.data.copy_(value.to(parameter.device))


def blank(shape: torch.Size) -> Tensor:
    """An uninitialised fp32 CPU tensor, also inside `zero.Init`, whose patched constructors would change dtype and device."""
    return torch.from_numpy(np.empty(tuple(shape), dtype=np.float32))


def draw_trunc_normal(parameter: Tensor, *, std: float, generator: torch.Generator) -> None:
    """N(0, std^2) cut at +-2 (absolute, as the published code does it), drawn in fp32 on the CPU: the same under any engine."""
    if not parameter.is_meta:
        assign(parameter, nn.init.trunc_normal_(blank(full_shape(parameter)), std=std, generator=generator))


def draw_uniform(parameter: Tensor, *, bound: float, generator: torch.Generator) -> None:
    """U(-bound, bound), drawn in fp32 on the CPU: the same under any engine."""
    if not parameter.is_meta:
        assign(parameter, blank(full_shape(parameter)).uniform_(-bound, bound, generator=generator))
