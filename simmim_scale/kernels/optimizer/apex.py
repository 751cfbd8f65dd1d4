"""NVIDIA Apex's FusedAdam, where it is installed. It cannot skip on the device, so a guarded step waits for the norm."""

import importlib
from typing import Any

import torch

from simmim_scale.kernels import apex
from simmim_scale.kernels.optimizer import AdamWForm


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """Its kernels are CUDA's; and another package is called apex on PyPI."""
    if device.type != "cuda":
        return f"its kernels are for CUDA, not for {device.type}"
    return apex.unavailable("optimizers", "amp_C")


def optimizer() -> AdamWForm:
    """See the contract in `kernels/optimizer/__init__.py`; adam_w_mode is the decoupled decay."""
    return AdamWForm(importlib.import_module("apex.optimizers").FusedAdam, {"adam_w_mode": True, "bias_correction": True})
