"""How DeepSpeed holds and runs the model, and which implementation computes each op."""

from typing import Literal

from pydantic import PositiveInt

from simmim_scale.config.section import Section, setting


class EngineConfig(Section):
    """How DeepSpeed holds and runs the model. The DeepSpeed dictionary is derived from this and the plan."""

    zero_stage: Literal[0, 1, 2, 3] = setting(
        3, "ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too.", unit="stage", source="choice"
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "bf16", "Arithmetic of forward and backward; updates are in fp32.", source="choice"
    )
    activation_checkpointing: Literal["none", "block"] = setting(
        "none", "block: keep only the input of each block and compute the rest again in backward.", source="choice"
    )
    fp16_initial_scale_power: int = setting(
        16, "fp16: the loss scale starts at 2 to this power.", unit="exponent", source="choice", ge=0, le=32
    )
    fp16_scale_window: PositiveInt = setting(
        1000, "fp16: steps without overflow before the scale doubles.", unit="steps", source="choice"
    )
    fp16_min_scale: PositiveInt = setting(1, "fp16: an overflow at this loss scale stops the run with advice.", source="choice")
    timeout_minutes: float = setting(
        30.0, "A collective that takes longer ends the run instead of hanging forever.", unit="minutes", source="choice", gt=0
    )


class KernelsConfig(Section):
    """Implementation of each op: auto takes the first that can run here; a name never falls back."""

    window_attention: str = setting("auto", "Shifted-window attention.", source="choice")
    masked_loss: str = setting("auto", "Error between prediction and picture over hidden pixels.", source="choice")
    optimizer: str = setting("auto", "AdamW on the fp32 masters.", source="choice")
    norm: str = setting("auto", "LayerNorm, with the residual sum beside it.", source="choice")
