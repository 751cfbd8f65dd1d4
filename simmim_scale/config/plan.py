"""The plan: every number that follows from the configuration, the number of samples and the world size.

Pure and computed once (`make_plan`); engine, loader and reports read it and compute none of it again.
"""

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass

from simmim_scale.config.schema import CosineConfig, MultiStepConfig, OptimizerConfig, ScheduleConfig, StepConfig, TrainConfig

# The published learning rates hold at this global batch and grow linearly with it (R: main_simmim.py, "linear scaled").
REFERENCE_BATCH = 512


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a function of the step, in absolute values (already scaled by the global batch).

    `shape` is "cosine" or "steps"; for "steps", `milestones` are the steps from which the rate is lower by `gamma` each.
    """

    shape: str
    peak: float
    warmup: float
    warmup_steps: int
    total_steps: int
    minimum: float = 0.0
    cosine_start: int = 0
    milestones: tuple[int, ...] = ()
    gamma: float = 1.0

    def at(self, step: int) -> float:
        """Learning rate of the update with number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.warmup + (self.peak - self.warmup) * step / self.warmup_steps
        if self.shape == "cosine":
            length = max(1, self.total_steps - self.cosine_start)
            share = min(1.0, (step - self.cosine_start) / length)
            return self.minimum + 0.5 * (self.peak - self.minimum) * (1 + math.cos(math.pi * share))
        return self.peak * self.gamma ** bisect_right(self.milestones, step)

    def key_steps(self) -> list[tuple[int, str]]:
        """Steps at which something happens, with what it is, in order and without repetition."""
        last = self.total_steps - 1
        points = [(0, "first step")]
        if self.warmup_steps:
            points.append((self.warmup_steps, "end of warm-up"))
        if self.shape == "cosine":
            points.append((self.total_steps // 2, "half-way"))
        for number, milestone in enumerate(self.milestones, start=1):
            points += [(milestone - 1, f"before drop {number}"), (milestone, f"drop {number}")]
        points.append((last, "last step"))
        named: dict[int, str] = {}
        for step, what in sorted(point for point in points if 0 <= point[0] <= last):
            named[step] = f"{named[step]}, {what}" if step in named else what
        return sorted(named.items())


@dataclass(frozen=True)
class Plan:
    """Batch arithmetic, length and learning rate of one run on one world size."""

    num_samples: int
    world_size: int
    global_batch: int
    micro_batch: int
    accumulation: int
    total_steps: int
    learning_rate: LearningRate

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer updates per epoch. A fraction, since batches run on over the end of an epoch: no sample is dropped."""
        return self.num_samples / self.global_batch

    @property
    def epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch

    def epoch_at(self, step: int) -> float:
        """Epochs completed before the update with number `step`."""
        return step / self.steps_per_epoch

    def position_at(self, step: int) -> int:
        """Samples consumed before the update with number `step`: the one integer that says where a run is."""
        return step * self.global_batch

    def lr(self, step: int) -> float:
        return self.learning_rate.at(step)

    def as_json(self) -> dict:
        """What `simmim describe --json` prints of the plan. Its steps count from 1, as in `metrics.jsonl`: step k is update k."""
        rows = [
            {"step": update + 1, "epoch": round(self.epoch_at(update + 1), 4), "lr": self.lr(update), "what": what}
            for update, what in self.learning_rate.key_steps()
        ]
        plain = asdict(self)
        del plain["learning_rate"]
        return {
            **plain,
            "steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": self.epochs,
            "warmup_steps": self.learning_rate.warmup_steps,
            "peak_lr": self.learning_rate.peak,
            "learning_rate": rows,
        }


def make_plan(
    train: TrainConfig, optimizer: OptimizerConfig, schedule: ScheduleConfig, *, num_samples: int, world_size: int
) -> Plan:
    """Computes the plan.

    Raises:
        ValueError: too few samples, a batch the world size does not divide, or a warm-up longer than the run.
    """
    if num_samples < train.global_batch:
        raise ValueError(
            f"train.global_batch: at most one epoch of samples, got {train.global_batch} for {num_samples} samples."
            f" Set train.global_batch to {num_samples} or less, or add images."
        )
    micro_batch, accumulation = split_batch(train.global_batch, world_size=world_size, at_most=train.micro_batch)
    steps_per_epoch = num_samples / train.global_batch
    # Rounded up, so that a run never sees less than the epochs asked for; the tolerance absorbs float noise of the product.
    total_steps = train.steps or math.ceil(train.epochs * steps_per_epoch - 1e-9)
    learning_rate = plan_learning_rate(
        schedule,
        base_lr=optimizer.base_lr,
        global_batch=train.global_batch,
        steps_per_epoch=steps_per_epoch,
        total_steps=max(1, total_steps),
    )
    return Plan(
        num_samples=num_samples,
        world_size=world_size,
        global_batch=train.global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        total_steps=max(1, total_steps),
        learning_rate=learning_rate,
    )


def split_batch(global_batch: int, *, world_size: int, at_most: int | None) -> tuple[int, int]:
    """Micro-batch per rank and rounds of accumulation whose product over all ranks is exactly `global_batch`."""
    if global_batch % world_size:
        lower = global_batch // world_size * world_size
        choices = f"{lower} or {lower + world_size}" if lower else str(world_size)
        raise ValueError(
            f"train.global_batch: a multiple of the number of ranks, got {global_batch} for {world_size} ranks."
            f" Use {choices}, or another number of ranks."
        )
    per_rank = global_batch // world_size
    limit = min(per_rank, at_most or per_rank)
    micro_batch = next(size for size in range(limit, 0, -1) if per_rank % size == 0)
    return micro_batch, per_rank // micro_batch


def plan_learning_rate(
    schedule: ScheduleConfig, *, base_lr: float, global_batch: int, steps_per_epoch: float, total_steps: int
) -> LearningRate:
    """Turns epochs and shares into steps, and base learning rates into absolute ones."""
    scale = global_batch / REFERENCE_BATCH
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise ValueError(
            f"schedule.warmup_epochs: shorter than the run, got {schedule.warmup_epochs} epochs ({warmup_steps} steps)"
            f" for a run of {total_steps} steps. Set it below {total_steps / steps_per_epoch:.3g}, or train longer."
        )
    common = {
        "peak": base_lr * scale,
        "warmup": schedule.warmup_lr * scale,
        "warmup_steps": warmup_steps,
        "total_steps": total_steps,
    }
    match schedule:
        case CosineConfig():
            start = warmup_steps if schedule.warmup_prefix else 0
            return LearningRate("cosine", **common, minimum=schedule.min_lr * scale, cosine_start=start)
        case StepConfig():
            milestones = tuple(round(share * total_steps) for share in schedule.milestones)
        case MultiStepConfig():
            milestones = tuple(round(epoch * steps_per_epoch) for epoch in schedule.milestone_epochs)
    if milestones and milestones[0] < warmup_steps:
        raise ValueError(
            f"schedule: the first drop (step {milestones[0]}) lies inside the warm-up ({warmup_steps} steps)."
            " Shorten schedule.warmup_epochs or move the milestones."
        )
    return LearningRate("steps", **common, milestones=milestones, gamma=schedule.gamma)
