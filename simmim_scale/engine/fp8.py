"""fp8 arithmetic in the large linear maps of the blocks, by torchao; off unless asked for.

Stability: fp8 keeps 3 bits of mantissa forward and 2 or 3 in gradients, scaled anew at every product. No run of ours has shown
that SwinV2-H converges with it. Begin with the recipe rowwise_with_gw_hp (a scale for each row; gradients of weights in bf16),
watch val_loss beside a bf16 run, and go back to "none" where they part: both can start from the same weights by init_from.

Only maps at least MIN_WIDTH wide on both sides are converted: below, the casts cost more than the products save. The projection
to q, k, v stays in bf16, since its biases are parameters of its own, which torchao would drop.
"""

import importlib.util

import torch
from torch import nn

from simmim_scale.config.schema import EngineConfig

MIN_WIDTH = 512  # channels: of SwinV2-H that leaves stages 2 to 4, 22 of its 24 blocks
MULTIPLE = 16  # bytes: fp8 products need it of both sides


def require_fp8(engine: EngineConfig, device: torch.device) -> None:
    """Raise ValueError where `engine.fp8` cannot be had; the message says why."""
    if engine.fp8 == "none":
        return
    refusal = _refusal(engine, device)
    if refusal is not None:
        raise ValueError(f"engine.fp8: {engine.fp8} was asked for, but {refusal}")


def convert_to_fp8(module: nn.Module, recipe: str, *, emulate: bool = False) -> list[str]:
    """Let torchao compute the large linear maps of the backbone's blocks in fp8, in place; returns their names.

    Parameters, their names and what checkpoints hold stay as they are.

    Args:
        recipe: "none", or torchao's "tensorwise", "rowwise" or "rowwise_with_gw_hp".
        emulate: fp8 numbers multiplied in fp32, for tests on any device.

    Raises:
        ValueError: the backbone lists no blocks, or none of its linear maps is large enough.
    """
    if recipe == "none":
        return []
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    blocks_of = getattr(getattr(module, "backbone", None), "checkpointable_blocks", None)
    inside = {id(part) for block in (blocks_of() if blocks_of else ()) for part in block.modules()}
    wanted = [name for name, part in module.named_modules() if id(part) in inside and _large_and_plain(part)]
    if not wanted:
        raise ValueError(
            f"engine.fp8: no linear map in the backbone's blocks has {MIN_WIDTH} channels on both sides, in multiples of"
            f" {MULTIPLE}. Set it to 'none': a model of this size would not gain."
        )
    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", emulate)  # frozen; the recipes give no other way
    names = set(wanted)
    convert_to_float8_training(module, config=config, module_filter_fn=lambda _part, name: name in names)
    return wanted


def _refusal(engine: EngineConfig, device: torch.device) -> str | None:
    if engine.precision != "bf16":
        return f"it belongs to engine.precision bf16, got {engine.precision}. Set engine.precision=bf16."
    if engine.zero_stage == 3:
        return (
            "under ZeRO-3 torchao would keep every gathered weight until backward, and with it the whole model on each GPU."
            " Set engine.zero_stage=1 or 2, or engine.fp8=none."
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        return f"{name} has no fp8 arithmetic (compute capability 8.9 or higher has). Set engine.fp8=none."
    if importlib.util.find_spec("torchao") is None:
        return "the package torchao is not installed. Install it with `pip install 'simmim-scale[fp8]'`, or set engine.fp8=none."
    return None


def _large_and_plain(part: nn.Module) -> bool:
    if not isinstance(part, nn.Linear) or type(part).forward is not nn.Linear.forward:
        return False  # a linear map with a forward of its own would lose it
    sides = (part.in_features, part.out_features)
    return min(sides) >= MIN_WIDTH and not any(side % MULTIPLE for side in sides)
