"""The configuration: frozen sections, each owned by one package, every value with its unit and source.

Start at `Config` at the end of the file; `config/load.py` reads YAML into it, `config/plan.py` derives numbers from it.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from simmim_scale.config.model import CustomModelConfig, ModelConfig, SwinBaseConfig, SwinConfig, SwinV2Config
from simmim_scale.config.section import IMAGENET_MEAN, IMAGENET_STD, Section, setting

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "CheckpointConfig",
    "Config",
    "CosineConfig",
    "CustomModelConfig",
    "DataConfig",
    "EngineConfig",
    "KernelsConfig",
    "MaskConfig",
    "ModelConfig",
    "MultiStepConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RemoteConfig",
    "ReportConfig",
    "ScheduleConfig",
    "StepConfig",
    "SwinBaseConfig",
    "SwinConfig",
    "SwinV2Config",
    "TrainConfig",
    "ValidationConfig",
]

# ------------------------------------------------------------------------------------------------------------ objective


class ObjectiveConfig(Section):
    """What SimMIM predicts from the encoded tokens."""

    head: str = setting("linear", "Prediction head: a name of `objectives/heads.py`, or 'module:attribute'.", source="S table 3")
    target: str = setting(
        "pixels", "Prediction target: a name of `objectives/targets.py`, or 'module:attribute'.", source="S table 4"
    )
    norm_target_window: int | None = setting(
        None,
        "Normalise the target by mean and variance of a sliding window of this odd side; null: plain pixels. 47 in SwinV2.",
        unit="pixels",
        source="R",
    )

    @field_validator("norm_target_window")
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and (value < 3 or value % 2 == 0):
            raise ValueError(
                f"norm_target_window: an odd number of at least 3, got {value}. The published value is 47; null turns it off."
            )
        return value


class MaskConfig(Section):
    """Which part of an image is hidden. The unit is a square cell of pixels."""

    sampler: Literal["random", "block", "square"] = setting(
        "random", "random: cells drawn independently; block: rectangles as in BEiT; square: one square.", source="S figure 1"
    )
    cell: PositiveInt = setting(32, "Side of a cell.", unit="pixels", source="R")
    ratio: float = setting(
        0.6, "Share of cells that are hidden, rounded up to whole cells.", unit="share", source="R", gt=0, lt=1
    )


# ----------------------------------------------------------------------------------------------------------------- data


class RemoteConfig(Section):
    """How shards at a URL are read: through fsspec, whole, into a bounded cache on every node."""

    cache_dir: str = setting("~/.cache/simmim_scale", "Directory of the cache, on a local disk; all ranks of a node share it.")
    cache_gb: float = setting(
        200.0, "Most that cached shards take; those used longest ago are dropped.", unit="GB", source="choice", gt=0
    )
    downloads: int = setting(
        2, "Shards that a rank fetches ahead at the same time; 0: none is fetched ahead.", unit="shards", source="choice", ge=0
    )
    attempts: PositiveInt = setting(
        8, "How often a piece of a file is asked for, with pauses from .25 s that double.", unit="times", source="choice"
    )
    timeout_s: float = setting(60.0, "A piece (16 MB) that takes longer is asked for again.", unit="s", source="choice", gt=0)
    options: dict[str, Any] = setting(
        {}, "Passed to fsspec's file system, e.g. endpoint_url. Keep credentials in the environment, not here."
    )


class DataConfig(Section):
    """Where samples come from and how an image becomes the model's input."""

    train: str = setting(
        "", "Shards (made by `python -m data_tools shard`) to train on: a directory, or a URL (s3://, https:// ...)."
    )
    validation: str | None = setting(None, "Shards held out for validation: a directory, or a URL; null: none.")
    remote: RemoteConfig = setting(RemoteConfig(), "Reading shards at a URL.")
    train_samples: PositiveInt | None = setting(
        None,
        "Number of samples to plan with while the shards are not there (describe, plan). A run counts them itself.",
        unit="samples",
    )
    crop_scale: tuple[float, float] = setting(
        (0.67, 1.0), "RandomResizedCrop: range of the crop's share of the area.", unit="share", source="R"
    )
    crop_ratio: tuple[float, float] = setting(
        (0.75, 4 / 3), "RandomResizedCrop: range of width over height.", unit="ratio", source="R"
    )
    flip: float = setting(0.5, "Probability of a horizontal flip.", unit="probability", source="R", ge=0, le=1)
    interpolation: Literal["bilinear", "bicubic"] = setting("bilinear", "Resampling of the crop, anti-aliased.", source="R")
    mean: tuple[float, ...] = setting(
        IMAGENET_MEAN, "Mean of the channels, subtracted on the device.", unit="share of 255", source="R"
    )
    std: tuple[float, ...] = setting(IMAGENET_STD, "Standard deviation of the channels.", unit="share of 255", source="R")
    band_range: tuple[float, float] | None = setting(
        None,
        "Values of NPY and multi-band TIFF files that become 0 and 255; null: those of 8 or 16 bits.",
        unit="value in the file",
    )
    decoder: Literal["cpu", "gpu"] = setting(
        "cpu",
        "Where JPEGs are decoded and resampled: by the workers, or by the rank's GPU (nvJPEG), whose time training then lacks.",
        source="choice",
    )
    workers: int = setting(
        4, "Processes that decode images, per rank; 0: the rank itself does it.", unit="processes", source="choice", ge=0
    )
    prefetch: PositiveInt = setting(4, "Micro-batches that each worker keeps ready.", unit="micro-batches", source="choice")
    mixed_shards: PositiveInt = setting(
        256,
        "Shards' worth of samples that are mixed at any time, over all nodes; sets with fewer shards are mixed as a whole.",
        unit="shards",
        source="choice",
    )

    @model_validator(mode="after")
    def _ranges(self) -> "DataConfig":
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high:
                raise ValueError(
                    f"{name}: a range (low, high) with 0 < low <= high, got ({low}, {high}). Swap or raise the bounds."
                )
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale: shares of the image's area, at most 1, got {self.crop_scale[1]}.")
        if self.band_range is not None and self.band_range[0] >= self.band_range[1]:
            raise ValueError(f"band_range: (low, high) with low < high, got {self.band_range}. Swap the values.")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"std: one value per channel as in mean ({len(self.mean)}), got {len(self.std)}. Make both lists equally long."
            )
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std: positive values, got {list(self.std)}.")
        return self


# ------------------------------------------------------------------------------------------------- optimizer and schedule


class OptimizerConfig(Section):
    """AdamW as published: no decay on 1-D parameters, biases, mask token, position-bias MLPs and logit scales."""

    base_lr: float = setting(
        2e-4, "Learning rate at a global batch of 512; the real one is base_lr * global batch / 512.", source="R", gt=0
    )
    betas: tuple[float, float] = setting((0.9, 0.999), "Decay of the running moments.", source="R")
    eps: float = setting(1e-8, "Added to the root of the second moment.", source="R", gt=0)
    weight_decay: float = setting(0.05, "Decoupled weight decay.", source="R", ge=0)
    clip_grad: float | None = setting(
        5.0, "Global gradient norm is clipped to this, once per step; null: never.", unit="L2 norm", source="R", gt=0
    )


class WarmupSection(Section):
    warmup_epochs: float = setting(
        10.0, "Linear warm-up, from warmup_lr to the base learning rate.", unit="epochs", source="R", ge=0
    )
    warmup_lr: float = setting(5e-7, "Learning rate at step 0, scaled with the global batch like base_lr.", source="R", ge=0)


class CosineConfig(WarmupSection):
    """Half a cosine from the base learning rate to min_lr, over the whole run."""

    name: Literal["cosine"] = setting("cosine", "Schedule.")
    min_lr: float = setting(1e-5, "Learning rate at the end, scaled with the global batch like base_lr.", source="R", ge=0)
    warmup_prefix: bool = setting(
        False,
        "true: the cosine starts after the warm-up; false: it runs from step 0 and the warm-up hides its beginning.",
        source="R",
    )


class StepConfig(WarmupSection):
    """Constant, then multiplied by gamma at given shares of the run: the supplement's step schedule."""

    name: Literal["step"] = setting("step", "Schedule.")
    milestones: tuple[float, ...] = setting(
        (0.9, 0.95), "Where the learning rate drops.", unit="share of all steps", source="S sec. 2"
    )
    gamma: float = setting(0.1, "Factor at each milestone.", unit="factor", source="S sec. 2", gt=0, le=1)

    @field_validator("milestones")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or any(not 0 < share < 1 for share in value):
            raise ValueError(
                f"milestones: increasing shares of the run between 0 and 1, got {list(value)}. The published ones are 0.9, 0.95."
            )
        return value


class MultiStepConfig(WarmupSection):
    """Constant, then multiplied by gamma at given epochs: the released 800-epoch schedule."""

    name: Literal["multistep"] = setting("multistep", "Schedule.")
    milestone_epochs: tuple[float, ...] = setting((700.0,), "Epochs at which the learning rate drops.", unit="epochs", source="R")
    gamma: float = setting(0.1, "Factor at each milestone.", unit="factor", source="R", gt=0, le=1)

    @field_validator("milestone_epochs")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or any(epoch <= 0 for epoch in value):
            raise ValueError(f"milestone_epochs: increasing positive epochs, got {list(value)}.")
        return value


ScheduleConfig = Annotated[CosineConfig | StepConfig | MultiStepConfig, Field(discriminator="name")]


# ----------------------------------------------------------------------------------------------- training, engine, output


class TrainConfig(Section):
    """How long to train, and how a global batch is cut."""

    epochs: float | None = setting(None, "Length of the run in epochs; give this or steps.", unit="epochs", gt=0)
    steps: PositiveInt | None = setting(None, "Length of the run in optimizer updates; give this or epochs.", unit="steps")
    global_batch: PositiveInt = setting(
        2048, "Samples per optimizer update, over all ranks and micro-batches.", unit="samples", source="R"
    )
    micro_batch: PositiveInt | None = setting(
        None,
        "Most samples one rank computes at once; the plan takes the largest divisor that fits. null: no accumulation.",
        unit="samples",
    )
    max_nonfinite_steps: PositiveInt = setting(
        10,
        "Stop after this many steps in a row whose loss or gradients were not finite. Each is skipped and counted.",
        unit="steps",
        source="choice",
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            got = "neither" if self.epochs is None else f"epochs={self.epochs} and steps={self.steps}"
            raise ValueError(f"epochs: give either epochs or steps, got {got}. Set the other one to null.")
        return self


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


class ValidationConfig(Section):
    """Loss on held-out images under fixed masks: it predicts fine-tuning (arXiv 2206.04664)."""

    every_steps: PositiveInt | None = setting(
        None, "Validate every so many steps; null: once an epoch. Always at the end.", unit="steps"
    )
    samples: PositiveInt | None = setting(None, "Use at most this many validation samples; null: all.", unit="samples")
    micro_batch: PositiveInt | None = setting(None, "Samples one rank evaluates at once; null: as in training.", unit="samples")
    gallery: int = setting(8, "Images whose reconstruction is drawn at each validation.", unit="images", source="choice", ge=0)


class CheckpointConfig(Section):
    """Run state for resuming, in RUN_DIR/checkpoints."""

    every_steps: PositiveInt | None = setting(
        None, "Save every so many steps; null: once an epoch. Always at the end.", unit="steps"
    )
    keep: PositiveInt = setting(2, "Complete saves that are kept.", unit="saves", source="choice")
    keep_every_steps: PositiveInt | None = setting(
        None, "Also keep, for good, the saves at multiples of this step.", unit="steps"
    )


class ReportConfig(Section):
    """Where metrics go besides RUN_DIR/metrics.jsonl and the terminal."""

    terminal_every_steps: PositiveInt = setting(
        10, "Steps between two lines when output is not a terminal.", unit="steps", source="choice"
    )
    tensorboard: bool = setting(False, "Also write TensorBoard event files (needs the package tensorboard).")
    wandb: str | None = setting(None, "Also log to this Weights & Biases project (needs the package wandb); null: not.")
    peak_tflops: float | None = setting(
        None, "Dense matrix-product peak of one device, for MFU; null: from the table of known devices.", unit="TFLOP/s", gt=0
    )


class Config(Section):
    """A whole run."""

    task: str = setting("pretrain", "What is trained: a name of `tasks/__init__.py`, or 'module:attribute'.")
    seed: int = setting(
        0, "Seed of the weights, the order of samples, crops, masks and drop path.", source="choice", ge=0, lt=2**32
    )
    run_dir: str = setting("runs/run", "Directory of everything the run writes; the same directory resumes it.")
    init_from: str | None = setting(None, "Portable weights, or a finished run, to start from (not a resume); null: random.")
    model: ModelConfig = setting(SwinV2Config(), "The backbone.")
    objective: ObjectiveConfig = setting(ObjectiveConfig(), "What is predicted.")
    mask: MaskConfig = setting(MaskConfig(), "What is hidden.")
    data: DataConfig = setting(DataConfig(), "Samples and views.")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "AdamW.")
    schedule: ScheduleConfig = setting(StepConfig(), "Learning rate over the run.")
    train: TrainConfig = setting(TrainConfig(epochs=100.0), "Length and batch.")
    engine: EngineConfig = setting(EngineConfig(), "DeepSpeed.")
    kernels: KernelsConfig = setting(KernelsConfig(), "Implementations.")
    validation: ValidationConfig = setting(ValidationConfig(), "Held-out loss.")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "Saving.")
    report: ReportConfig = setting(ReportConfig(), "Logging.")
    deepspeed: dict[str, Any] = setting(
        {}, "Keys merged into the derived DeepSpeed dictionary, for what has no setting of its own."
    )

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        height, width = self.model.image_size
        cell, patch = self.mask.cell, self.model.patch_size
        if height % cell or width % cell:
            raise ValueError(
                f"mask.cell: must divide the image, got a cell of {cell} for {height}x{width} pixels."
                f" Choose a common divisor of {height} and {width} that is a multiple of {patch}."
            )
        if cell % patch:
            raise ValueError(
                f"mask.cell: a multiple of the patch size {patch}, got {cell}. Choose {max(patch, cell // patch * patch)}."
            )
        if self.model.in_chans != len(self.data.mean):
            raise ValueError(
                f"data.mean: one value per input channel, got {len(self.data.mean)} for model.in_chans {self.model.in_chans}."
                " Give mean and std of your own channels."
            )
        return self
