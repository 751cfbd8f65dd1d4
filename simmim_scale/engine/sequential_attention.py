"""SwinV2's sequential self-attention computation: attention of the early stages on a few windows at a time."""

from typing import Any

from torch import nn

from simmim_scale.engine.activation_checkpointing import EARLY_STAGES


def apply_sequential_attention(module: nn.Module, rows: int) -> int:
    """Let attention of the first two stages of `module.backbone` work on `rows` rows of windows at once, in place.

    Args:
        rows: see `kernels.window_attention.window_attention`; 0: all at once.
    Returns:
        How many blocks do.
    Raises:
        ValueError: the backbone has no stages with attention in windows.
    """
    if rows == 0:
        return 0
    backbone: Any = getattr(module, "backbone", module)
    stages = getattr(backbone, "checkpointable_stages", list)()[:EARLY_STAGES]
    found = [layer for stage in stages for block in stage for layer in block.modules() if hasattr(layer, "rows_at_once")]
    if not found:
        raise ValueError(
            f"engine.sequential_attention: needs a backbone with attention in windows, which {type(backbone).__name__} has not"
            f" in its first {EARLY_STAGES} stages, got {rows}. Set it to 0. (A backbone of your own: give checkpointable_stages()"
            " blocks with a layer that has an attribute rows_at_once.)"
        )
    for layer in found:
        layer.rows_at_once = rows
    return len(found)
