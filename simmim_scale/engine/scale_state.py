"""fp16's loss scale as plain numbers, whichever of DeepSpeed's optimizers holds it, so that it survives a change of the stage."""

from collections.abc import Mapping
from typing import Any

# Our name -> the attribute of DeepSpeed 0.19.8 (DynamicLossScaler in stages 1 to 3, LossScaleConfig in stage 0).
ATTRIBUTES = {
    "scale": "cur_scale",
    "iteration": "cur_iter",
    "last_overflow": "last_overflow_iter",
    "hysteresis": "cur_hysteresis",
}


def scale_state(optimizer: Any) -> dict[str, float] | None:
    """The dynamic loss scale and its counters; None where there is none (fp32, bf16)."""
    holder = _holder(optimizer)
    if holder is None:
        return None
    return {ours: getattr(holder, theirs) for ours, theirs in ATTRIBUTES.items() if hasattr(holder, theirs)}


def load_scale(optimizer: Any, state: Mapping[str, float] | None) -> None:
    """Go on with a saved loss scale."""
    holder = _holder(optimizer)
    for ours, value in (state or {}).items():
        if holder is not None and hasattr(holder, ATTRIBUTES[ours]):
            setattr(holder, ATTRIBUTES[ours], value)


def _holder(optimizer: Any) -> Any:
    """What counts the loss scale; None where it is fixed."""
    stage_0 = getattr(optimizer, "loss_scale_config", None)
    if stage_0 is not None:
        return stage_0 if stage_0.dynamic_loss_scale else None
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
