"""DeepSpeed's FusedAdam for CUDA, compiled at its first use (about a minute, cached). It cannot skip on the device."""

import importlib
from typing import Any

import torch

from simmim_scale.kernels.optimizer import AdamWForm


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """Its kernels are CUDA's and are built by nvcc when first used."""
    if device.type != "cuda":
        return f"its kernels are for CUDA, not for {device.type} (deepspeed_cpu is for CPUs)"
    builder = importlib.import_module("deepspeed.ops.op_builder").FusedAdamBuilder()
    return None if builder.is_compatible(verbose=False) else "DeepSpeed cannot compile its fused_adam here (needs nvcc)"


def optimizer() -> AdamWForm:
    """See the contract in `kernels/optimizer/__init__.py`; adam_w_mode is the decoupled decay."""
    return AdamWForm(importlib.import_module("deepspeed.ops.adam").FusedAdam, {"adam_w_mode": True, "bias_correction": True})
