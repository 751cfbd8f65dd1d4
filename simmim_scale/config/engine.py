"""How DeepSpeed holds and runs the model, and which implementation computes each op."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from simmim_scale.config.section import Section, setting


class EngineConfig(Section):
    """How DeepSpeed holds and runs the model. The DeepSpeed dictionary is derived from this and the plan."""

    zero_stage: Literal[0, 1, 2, 3] = setting(
        3, "ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too.", unit="stage", source="choice"
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "bf16", "Arithmetic of forward and backward; updates are in fp32.", source="choice"
    )
    activation_checkpointing: Literal["none", "block", "stage", "selective", "offload"] = setting(
        "none",
        "What forward keeps for backward, which computes the rest again. block: the input of each block; stage: the same in the"
        " first two stages alone; selective: results of matrix products too; offload: as block, in CPU memory.",
        source="choice",
    )
    checkpointing_backend: Literal["torch", "torch_reentrant", "deepspeed", "fairscale"] = setting(
        "torch", "Whose code computes again: all give the same numbers. selective needs torch.", source="choice"
    )
    sequential_attention: NonNegativeInt = setting(
        0,
        "Most rows of windows of one image that attention of the first two stages works on at once, in forward and again in"
        " backward, so that only their n x n matrices exist; 0: all of the batch at once. For large images; goes with any"
        " activation_checkpointing.",
        unit="rows of windows",
        source="V2 sec. 3.4",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = setting(
        "none",
        "ZeRO-Offload: where masters and moments lie and are updated, instead of on the GPU; nvme (ZeRO-Infinity) needs stage 3.",
        source="choice",
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = setting(
        "none", "ZeRO-Infinity: where a rank's share of the parameters lies while it is not used; needs stage 3.", source="choice"
    )
    nvme_path: str | None = setting(None, "Directory on a local NVMe disk, for what is offloaded to nvme.")
    compile: Literal["none", "block"] = setting(
        "none",
        "block: torch.compile for each block of the backbone. The first step of a new model takes minutes; later starts find what"
        " was compiled in a cache on disk ($TORCHINDUCTOR_CACHE_DIR, else ~/.cache/simmim_scale/inductor).",
        source="choice",
    )
    fp8: Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"] = setting(
        "none",
        "Large linear maps in fp8 by torchao, with this recipe of scales; the last is the most careful. Experimental: not known"
        " to converge like bf16 (engine/fp8.py). Compute capability 8.9 and higher, ZeRO-0 to 2, with engine.compile=block.",
        source="choice",
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

    @model_validator(mode="after")
    def _compiled_blocks_hide_their_operators(self) -> "EngineConfig":
        if self.compile == "block" and self.activation_checkpointing == "selective":
            raise ValueError(
                "compile: selective checkpointing chooses among the operators of a block, and a compiled block shows none."
                " Choose activation_checkpointing=block, stage or offload, or compile=none."
            )
        return self

    @model_validator(mode="after")
    def _attention_in_turn_is_not_compiled(self) -> "EngineConfig":
        if self.compile == "block" and self.sequential_attention:
            raise ValueError(
                "sequential_attention: runs attention again inside of its backward, which torch.compile cannot follow, got"
                f" {self.sequential_attention} with compile=block. Set engine.sequential_attention=0, or engine.compile=none."
            )
        return self

    @model_validator(mode="after")
    def _offloading_is_possible(self) -> "EngineConfig":
        for name, place, least in (
            ("offload_optimizer", self.offload_optimizer, 3 if self.offload_optimizer == "nvme" else 1),
            ("offload_parameters", self.offload_parameters, 3),
        ):
            if place != "none" and self.zero_stage < least:
                raise ValueError(
                    f"{name}: {place} needs ZeRO stage {least} or more, got zero_stage {self.zero_stage}."
                    f" Set engine.zero_stage={least}, or engine.{name}=none."
                )
            if place == "nvme" and self.nvme_path is None:
                raise ValueError(
                    f"nvme_path: {name} nvme needs a directory on a local NVMe disk, got null. Set engine.nvme_path."
                )
        if self.offload_parameters == "nvme" and self.offload_optimizer == "none":
            raise ValueError(
                "offload_parameters: nvme keeps its fp32 masters off the GPU too, got offload_optimizer none."
                " Set engine.offload_optimizer to cpu or nvme."
            )
        return self


class KernelsConfig(Section):
    """Implementation of each op: auto takes the first that can run here; a name never falls back."""

    window_attention: str = setting("auto", "Shifted-window attention.", source="choice")
    masked_loss: str = setting("auto", "Error between prediction and picture over hidden pixels.", source="choice")
    optimizer: str = setting("auto", "AdamW on the fp32 masters.", source="choice")
    norm: str = setting("auto", "LayerNorm, with the residual sum beside it.", source="choice")
