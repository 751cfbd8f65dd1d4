"""PyTorch's fused AdamW: one pass over parameter, gradient and moments, which also clips and skips. Runs on CPU and GPU."""

from typing import Any

import torch

from simmim_scale.kernels.optimizer import AdamWForm


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """It exists for CPUs and for GPUs of CUDA and its kin."""
    return None if device.type in ("cpu", "cuda", "xpu", "mps") else f"PyTorch has no fused AdamW for {device.type}"


def optimizer() -> AdamWForm:
    """See the contract in `kernels/optimizer/__init__.py`."""
    return AdamWForm(torch.optim.AdamW, {"fused": True}, skips_on_device=True)
