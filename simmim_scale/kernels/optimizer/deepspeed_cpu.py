"""DeepSpeed's Adam for CPUs, made for offloading: compiled at its first use (75-130 s), so `auto` never takes it."""

import importlib
from typing import Any

import torch

from simmim_scale.kernels.optimizer import AdamWForm


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """Its code is for CPUs and needs a C++ compiler."""
    if device.type != "cpu":
        return f"its code is for CPUs, not for {device.type}"
    builder = importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder()
    return None if builder.is_compatible(verbose=False) else "DeepSpeed cannot compile its cpu_adam here (needs a C++ compiler)"


def optimizer() -> AdamWForm:
    """See the contract in `kernels/optimizer/__init__.py`; adamw_mode is the decoupled decay."""
    cls = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    return AdamWForm(cls, {"adamw_mode": True, "bias_correction": True, "fp32_optimizer_states": True})
