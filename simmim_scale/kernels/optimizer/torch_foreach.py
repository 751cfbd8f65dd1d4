"""PyTorch's AdamW over lists of tensors: few kernel launches, but about ten passes over memory. Runs everywhere."""

from typing import Any

import torch

from simmim_scale.kernels.optimizer import AdamWForm


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """It runs everywhere."""
    return None


def optimizer() -> AdamWForm:
    """See the contract in `kernels/optimizer/__init__.py`."""
    return AdamWForm(torch.optim.AdamW, {"foreach": True})
