"""The configuration: frozen sections, each owned by one package, every value with its unit and source.

`Config` holds a whole run; its sections are in the modules beside this one. `load.py` reads YAML into it, `plan.py` derives
numbers from it.
"""

from typing import Any, Literal

from pydantic import model_validator

from simmim_scale.config.classification import ClassificationConfig
from simmim_scale.config.data import DataConfig, RemoteConfig
from simmim_scale.config.engine import EngineConfig, KernelsConfig
from simmim_scale.config.model import (
    CustomModelConfig,
    ModelConfig,
    ResNetConfig,
    SwinBaseConfig,
    SwinConfig,
    SwinV2Config,
    ViTConfig,
)
from simmim_scale.config.objective import MaskConfig, ObjectiveConfig
from simmim_scale.config.optimization import (
    CosineConfig,
    MultiStepConfig,
    OptimizerConfig,
    RecoveryConfig,
    ScheduleConfig,
    StepConfig,
    TrainConfig,
)
from simmim_scale.config.output import CheckpointConfig, ReportConfig, ValidationConfig
from simmim_scale.config.probe import ProbeConfig
from simmim_scale.config.section import IMAGENET_MEAN, IMAGENET_STD, Section, setting

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "CheckpointConfig",
    "ClassificationConfig",
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
    "ProbeConfig",
    "RecoveryConfig",
    "RemoteConfig",
    "ReportConfig",
    "ResNetConfig",
    "ScheduleConfig",
    "StepConfig",
    "SwinBaseConfig",
    "SwinConfig",
    "SwinV2Config",
    "TrainConfig",
    "ValidationConfig",
    "ViTConfig",
]

# They hide nothing (a backbone alone is not trained at all), so the size of a cell is no limit to their image size.
TASKS_WITHOUT_MASKS = ("classification", "backbone")


class Config(Section):
    """A whole run."""

    task: str = setting("pretrain", "What is trained: a name of `tasks/__init__.py`, or 'module:attribute'.")
    seed: int = setting(
        0, "Seed of the weights, the order of samples, crops, masks and drop path.", source="choice", ge=0, lt=2**32
    )
    run_dir: str = setting("runs/run", "Directory of everything the run writes; the same directory resumes it.")
    init_from: str | None = setting(None, "Portable weights, or a finished run, to start from (not a resume); null: random.")
    init_resize: Literal["geometric", "bicubic"] = setting(
        "geometric",
        "How bias tables of Swin V1 from init_from are interpolated to another window. SwinV2 needs no interpolation.",
        source="R",
    )
    model: ModelConfig = setting(SwinV2Config(), "The backbone.")
    objective: ObjectiveConfig = setting(ObjectiveConfig(), "What is predicted.")
    mask: MaskConfig = setting(MaskConfig(), "What is hidden.")
    classification: ClassificationConfig = setting(ClassificationConfig(), "Fine-tuning for classification.")
    data: DataConfig = setting(DataConfig(), "Samples and views.")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "AdamW.")
    schedule: ScheduleConfig = setting(StepConfig(), "Learning rate over the run.")
    train: TrainConfig = setting(TrainConfig(epochs=100.0), "Length and batch.")
    engine: EngineConfig = setting(EngineConfig(), "DeepSpeed.")
    kernels: KernelsConfig = setting(KernelsConfig(), "Implementations.")
    validation: ValidationConfig = setting(ValidationConfig(), "Held-out loss.")
    probe: ProbeConfig = setting(ProbeConfig(), "Probes of frozen features while training.")
    checkpoint: CheckpointConfig = setting(CheckpointConfig(), "Saving.")
    report: ReportConfig = setting(ReportConfig(), "Logging.")
    deepspeed: dict[str, Any] = setting(
        {}, "Keys merged into the derived DeepSpeed dictionary, for what has no setting of its own."
    )

    @model_validator(mode="after")
    def _mask_fits(self) -> "Config":
        if self.task in TASKS_WITHOUT_MASKS:
            return self
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
        scale = self.objective.downsample
        if cell % scale:
            raise ValueError(
                f"objective.downsample: a predicted pixel must lie in one cell of the mask, got {scale} for a cell of {cell}."
                f" Choose a divisor of {cell}, or larger cells."
            )
        return self

    @model_validator(mode="after")
    def _attention_in_turn_has_something_to_spare(self) -> "Config":
        rows = self.engine.sequential_attention
        if rows and isinstance(self.model, ResNetConfig | ViTConfig):
            raise ValueError(
                f"engine.sequential_attention: for attention in windows (swin, swin_v2), got {rows} for {self.model.name}."
                " Set engine.sequential_attention=0."
            )
        if rows and self.kernels.window_attention == "triton":
            raise ValueError(
                f"engine.sequential_attention: Triton's window attention holds no n x n matrix, so there is nothing to spare, got"
                f" {rows}. Set engine.sequential_attention=0, or another kernels.window_attention."
            )
        return self

    @model_validator(mode="after")
    def _channels_agree(self) -> "Config":
        if self.objective.second_view is not None and self.data.decoder == "gpu":
            raise ValueError("data.decoder: gpu makes no second view of a crop (objective.second_view). Set data.decoder=cpu.")
        if self.model.in_chans != len(self.data.mean):
            raise ValueError(
                f"data.mean: one value per input channel, got {len(self.data.mean)} for model.in_chans {self.model.in_chans}."
                " Give mean and std of your own channels, which `python -m data_tools stats DIR --in-chans"
                f" {self.model.in_chans}` measures."
            )
        return self
