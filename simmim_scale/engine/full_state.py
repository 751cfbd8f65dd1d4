"""The whole model's weights from an engine, for export: gathered one at a time, from the fp32 masters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simmim_scale.engine.runtime import Runtime
from simmim_scale.engine.state import persistent_buffers


def full_state_dict(wrapped: Any, runtime: Runtime) -> dict[str, Tensor]:
    """Parameters in fp32 and persistent buffers on the CPU of the main rank, {} elsewhere. One at a time; collective."""
    masters = _unfused_masters(wrapped.optimizer)
    state: dict[str, Tensor] = {}
    for name, parameter in wrapped.module.named_parameters():
        value = _full_fp32(parameter, masters)
        if runtime.is_main:
            state[name] = value.detach().to("cpu", torch.float32, copy=True)
    if runtime.is_main:
        state.update(persistent_buffers(wrapped.module))
    return state


def _full_fp32(parameter: nn.Parameter, masters: Mapping[int, Tensor]) -> Tensor:
    """A whole parameter, from its fp32 master where there is one."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if id(parameter) in masters:
        return masters[id(parameter)]
    if parameter.requires_grad:
        full = safe_get_full_fp32_param(parameter)
        if full is not None:
            return full
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def _unfused_masters(optimizer: Any) -> dict[int, Tensor]:
    """Stage 0 in bf16 or fp16 keeps its fp32 masters in lists beside the parameters."""
    pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False)
    return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
