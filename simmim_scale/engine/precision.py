"""Whether a device computes in a precision: asked once, before any work, so that a run does not die or crawl later."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def require_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError when `device` has no arithmetic for `precision` ("fp32", "bf16" or "fp16")."""
    if precision == "fp32" or _supports(precision, device):
        return
    alternatives = [name for name in ("bf16", "fp16") if name != precision and _supports(name, device)]
    raise ValueError(
        f"engine.precision: {precision} was asked for, but {_name(device)} has no {precision} arithmetic."
        f" Choose {' or '.join(['fp32', *alternatives])}."
    )


def _supports(precision: str, device: torch.device) -> bool:
    if device.type == "cuda":
        # Compute capability 8.0 (Ampere) brought bf16; older GPUs emulate it more slowly than fp32.
        return precision == "fp16" or torch.cuda.get_device_capability(device) >= (8, 0)
    check = "_is_mkldnn_bf16_supported" if precision == "bf16" else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, check)())
    except (AttributeError, RuntimeError):  # a PyTorch built without oneDNN
        return False


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
