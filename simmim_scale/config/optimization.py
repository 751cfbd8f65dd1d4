"""The optimizer, the learning rate over a run, its length and how a batch is cut; `plan.py` computes what follows from them."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from simmim_scale.config.section import Section, setting


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
    ema_decay: float | None = setting(
        None,
        "Also keep an average of the weights that decays by this a step (at first faster); null: none.",
        unit="factor per step",
        source="choice",
        gt=0,
        lt=1,
    )
    layer_decay: float = setting(
        1.0,
        "Factor of the learning rate from each layer to the one below it, for fine-tuning; 1: all learn alike.",
        unit="factor",
        source="R",
        gt=0,
        le=1,
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


class RecoveryConfig(Section):
    """Going back to the last save when training goes wrong, and passing over the samples since."""

    rollbacks: int = setting(
        0,
        "How often a run may go back, after a loss spike or after train.max_nonfinite_steps; 0: never, and nothing is a spike.",
        unit="times",
        source="choice",
        ge=0,
    )
    spike_factor: float = setting(
        2.0, "A loss is high above so many times the median of those before it.", unit="factor", source="choice", gt=1
    )
    spike_window: PositiveInt = setting(
        200, "Losses that the median is taken of; nothing is high before half of them are known.", unit="steps", source="choice"
    )
    spike_steps: PositiveInt = setting(
        5,
        "So many high losses in a row are a spike. No save is made while the last loss was high.",
        unit="steps",
        source="choice",
    )


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

    recovery: RecoveryConfig = setting(RecoveryConfig(), "Going back after a loss spike.")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.epochs is None) == (self.steps is None):
            got = "neither" if self.epochs is None else f"epochs={self.epochs} and steps={self.steps}"
            raise ValueError(f"epochs: give either epochs or steps, got {got}. Set the other one to null.")
        return self
