"""The DeepSpeed dictionary, derived from the config's sections and the plan's numbers. Pure; nobody writes it by hand."""

import copy
from collections.abc import Mapping
from typing import Any

from simmim_scale.config.schema import EngineConfig, OptimizerConfig
from simmim_scale.engine.offload import aio_settings, offload_settings
from simmim_scale.engine.zero_settings import ModelSizes, zero_settings

# Keys of DeepSpeed that a setting of ours owns: two owners of one number would disagree sooner or later.
OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "engine.nvme_path",
    "zero_optimization.offload_param.device": "engine.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "engine.nvme_path",
    "bf16.enabled": "engine.precision",
    "bfloat16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "fp16.initial_scale_power": "engine.fp16_initial_scale_power",
    "fp16.loss_scale_window": "engine.fp16_scale_window",
    "fp16.min_loss_scale": "engine.fp16_min_scale",
    "tensorboard": "report.tensorboard",
    "wandb": "report.wandb",
    "csv_monitor": "report",
    "comet": "report",
    "compile": "engine.compile",
    "checkpoint": "checkpoint",
    # Changed, these two would let a non-finite gradient be applied instead of skipped.
    "zero_optimization.compute_grad_norm": "train.max_nonfinite_steps",
    "bf16.check_grad_overflow": "train.max_nonfinite_steps",
}

# Keys that mislead here -> why, and what to use.
MISLEADING = {
    "flops_profiler": "counts no parameters and the work twice under ZeRO-3 (DeepSpeed 0.19.8)."
    " Use simmim describe, or simmim bench step, and remove this key.",
}


def deepspeed_config(
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    *,
    micro_batch: int,
    accumulation: int,
    global_batch: int,
    sizes: ModelSizes | None = None,
    world_size: int = 1,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        micro_batch, accumulation, global_batch: the plan's numbers; samples, micro-batches, samples.
        sizes: the model's, for ZeRO's buffers; None before it exists.
        extra: the config's `deepspeed:` section, merged last, section by section.
    Raises:
        ValueError: `extra` sets a key that one of our settings owns, or one that misleads.
    """
    own = guards_itself(engine)
    config: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if own else optimizer.clip_grad or 0.0,
        "zero_optimization": {
            **_zero(engine, sizes, world_size=world_size, own=own),
            **offload_settings(engine, world_size=world_size),
        },
        # torch.optim.AdamW needs no compilation, unlike DeepSpeed's own; it is "untested" only in DeepSpeed's list.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **_precision(engine, own=own),
        **aio_settings(engine),
    }
    _reject_owned(extra or {})
    return _merge(config, extra or {})


def guards_itself(engine: EngineConfig) -> bool:
    """True where our optimizer measures, clips and skips, since DeepSpeed would not, or would make the host wait for it.

    Stage 0 in fp32: DeepSpeed uses our optimizer bare, and neither checks nor measures gradients. Stage 2 in bf16: with its
    checks off it asks the device nothing. That is the one sharded case where they can be off: stage 1 in bf16 is another class of
    DeepSpeed's, whose check is fixed, stage 3 always checks, and offloaded gradients are not on the device.
    """
    return (engine.zero_stage, engine.precision) in {(0, "fp32"), (2, "bf16")} and engine.offload_optimizer == "none"


def _zero(engine: EngineConfig, sizes: ModelSizes | None, *, world_size: int, own: bool) -> dict[str, Any]:
    # What is offloaded is given back after use, or it would fill the memory that it should spare.
    section = zero_settings(engine.zero_stage, sizes, world_size=world_size, may_keep=engine.offload_parameters == "none")
    return {**section, "compute_grad_norm": False} if own and engine.zero_stage > 0 else section


def _precision(engine: EngineConfig, *, own: bool) -> dict[str, Any]:
    if engine.precision == "fp32":
        return {}
    section: dict[str, Any] = {"enabled": True}
    if engine.precision == "bf16":
        # Our optimizer refuses what is not finite, or DeepSpeed must: without the check it applies a NaN in stages 1 and 2.
        section["check_grad_overflow"] = not own
    else:
        section |= _loss_scaling(engine)
    # Micro-batches are summed in fp32 where DeepSpeed can: in bf16 the sum would lose what the later ones add.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if engine.zero_stage > 0 else {}
    return {engine.precision: section, **sums}


def _loss_scaling(engine: EngineConfig) -> dict[str, Any]:
    return {
        "loss_scale": 0,  # dynamic
        "initial_scale_power": engine.fp16_initial_scale_power,
        "loss_scale_window": engine.fp16_scale_window,
        "min_loss_scale": engine.fp16_min_scale,
        "hysteresis": 1,  # halve at every overflow: waiting would only skip more steps
    }


def _reject_owned(extra: Mapping[str, Any]) -> None:
    for key, why in MISLEADING.items():
        if key in extra:
            raise ValueError(f"deepspeed.{key}: {why}")
    for path, value in _leaves(extra):
        for owned, setting in OWNED.items():
            if path == owned or path.startswith(f"{owned}."):
                raise ValueError(
                    f"deepspeed.{path}: belongs to the setting {setting}, got {value!r}. Set {setting} and remove this key."
                )


def _leaves(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        path = f"{prefix}{key}"
        found += _leaves(value, f"{path}.") if isinstance(value, Mapping) and value else [(path, value)]
    return found


def _merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in extra.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else copy.deepcopy(value)
    return merged
