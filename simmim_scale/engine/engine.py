"""The engine: one training step, one evaluation step, saving and loading, over DeepSpeed's stages 0 to 3.

Read `Engine.train_step` first. A step with a non-finite loss or gradient is skipped on all ranks: parameters and optimizer
state stay as they were, while the step counter, and with it the learning rate and the samples, moves on.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmim_scale.config.schema import EngineConfig, OptimizerConfig
from simmim_scale.engine import ema
from simmim_scale.engine.activation_checkpointing import apply_activation_checkpointing
from simmim_scale.engine.deepspeed_config import deepspeed_config, guards_itself
from simmim_scale.engine.ema import WeightAverage, master_weights
from simmim_scale.engine.guard import NonFiniteGuard, first_nonfinite_module
from simmim_scale.engine.optim import GuardedAdamW, parameter_groups
from simmim_scale.engine.precision import require_precision
from simmim_scale.engine.runtime import Runtime
from simmim_scale.engine.schedule import set_learning_rate
from simmim_scale.engine.state import full_state_dict, load_state, save_state

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """One optimizer update, or a skipped one.

    Attributes:
        step: steps done so far, this one included.
        loss: mean over the global batch; not finite when that is why the step was skipped.
        lr: learning rate of the groups whose lr_scale is 1.
        grad_norm: L2 norm over all parameters before clipping; infinite when it was not finite.
        skipped: parameters and optimizer state were left as they were.
        nonfinite_source: dotted name of the first module whose output was not finite, or "gradients"; None when all was finite
            or fp16 merely lowered its loss scale.
        loss_scale: fp16's scale during this step; None in other precisions.
        nonfinite_steps: how many steps of the run were skipped for a nonfinite_source.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    skipped: bool
    nonfinite_source: str | None
    loss_scale: float | None
    nonfinite_steps: int


def build_engine(
    build_module: Callable[[], nn.Module],
    *,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    lr: Callable[[int], float],
    micro_batch: int,
    accumulation: int,
    global_batch: int,
    runtime: Runtime,
    seed: int = 0,
    max_nonfinite_steps: int = 10,
    lr_scales: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ema_decay: float | None = None,
    extra: Mapping[str, Any] | None = None,
) -> "Engine":
    """Build the module (under `deepspeed.zero.Init` in stage 3) and the engine around it. Collective.

    Args:
        build_module: returns the module with its weights initialised; `module(batch)` returns {"loss": scalar, ...}.
        lr: learning rate of a step, counted from 0.
        micro_batch, accumulation, global_batch: the plan's numbers; samples, micro-batches per step, samples.
        seed: for modules that draw from torch's generator; the same on every rank.
        max_nonfinite_steps: stop after this many skipped steps in a row.
        lr_scales: factor of the learning rate of each parameter by name (layer decay); None: 1.
        ema_decay: of an average of the weights beside them; None: none is kept.
        extra: the config's `deepspeed:` section.
    Raises:
        ValueError: the device lacks the precision, `extra` sets a key we own, or the batch numbers do not multiply.
    """
    import deepspeed

    require_precision(engine.precision, runtime.device)
    _check_batch(micro_batch, accumulation, global_batch, runtime.world_size)
    config = deepspeed_config(
        engine, optimizer, micro_batch=micro_batch, accumulation=accumulation, global_batch=global_batch, extra=extra
    )
    torch.manual_seed(seed)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=engine.zero_stage == 3):
        module = build_module()
    module.train()
    apply_activation_checkpointing(module, engine.activation_checkpointing)
    groups = parameter_groups(module, optimizer.weight_decay, lr_scales(module) if lr_scales else None)
    adamw = GuardedAdamW(groups, optimizer, guard=guards_itself(engine))
    wrapped, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=config, dist_init_required=False)
    adamw.armed = True
    average = WeightAverage(master_weights(wrapped), ema_decay) if ema_decay else None
    return Engine(wrapped, engine, lr, accumulation, runtime, NonFiniteGuard(max_nonfinite_steps), average)


class Engine:
    """A module under training. Its methods are collective, `step` and `module` aside."""

    def __init__(
        self,
        wrapped: Any,
        config: EngineConfig,
        lr: Callable[[int], float],
        accumulation: int,
        runtime: Runtime,
        guard: NonFiniteGuard,
        average: WeightAverage | None = None,
    ) -> None:
        self.step = 0
        self.config = config
        self.runtime = runtime
        self._wrapped = wrapped
        self._lr = lr
        self._accumulation = accumulation
        self._guard = guard
        self._average = average
        self._scaler = LossScale(wrapped, config) if config.precision == "fp16" else None

    @property
    def module(self) -> nn.Module:
        """The module itself. Under ZeRO-3 its parameters are partitioned: shapes are in `ds_shape`."""
        return self._wrapped.module

    def train_step(self, micro_batches: Iterable[Batch]) -> StepResult:
        """One optimizer update from this rank's `accumulation` micro-batches, already on the device.

        They are kept until the update is done, so that a non-finite step can be diagnosed.

        Raises:
            NonFiniteError: too many skipped steps in a row.
            LossScaleError: fp16 overflowed at the smallest loss scale.
        """
        self.runtime.heartbeat.mark("train", self.step)
        lr = self._lr(self.step)
        scale = self._scaler.value if self._scaler else None
        set_learning_rate(self._wrapped.optimizer, lr)
        batches, losses = self._accumulate(micro_batches)
        loss = self.runtime.sum_ranks(float(torch.stack(losses).double().mean())) / self.runtime.world_size
        skipped = bool(getattr(self._wrapped.optimizer, "overflow", False))
        self.step += 1
        if self._average and not skipped:
            self._average.update()
        source = self._account(skipped, loss, batches, losses, scale)
        self.runtime.heartbeat.mark("between", self.step)  # records, waiting for data
        return StepResult(self.step, loss, lr, self._grad_norm(skipped, scale), skipped, source, scale, self._guard.total)

    def evaluate_step(self, batch: Batch) -> dict[str, Tensor]:
        """The module's outputs for a batch, in eval mode and without gradients. Every rank calls it equally often."""
        self.runtime.heartbeat.mark("validate")
        self._wrapped.eval()
        try:
            with torch.no_grad():
                return self._wrapped(batch)
        finally:
            self._wrapped.train()

    def save(self, path: Path) -> list[Path]:
        """Write the run state into the directory `path`; returns the files this rank wrote.

        Raises:
            OSError: a file could not be written on some rank; raised on all of them.
        """
        self.runtime.heartbeat.mark("save")
        state: dict[str, Any] = {"step": self.step, "guard": self._guard.state_dict()}
        if self._average is None:
            return save_state(self._wrapped, self.config, self.runtime, path, state)
        state["ema_updates"] = self._average.updates
        own = {ema.file_name(self.runtime.rank): self._average.save}
        return save_state(self._wrapped, self.config, self.runtime, path, state, own)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote, right after `build_engine`.

        DeepSpeed unpickles the files: load only what comes from a place you trust.

        Raises:
            ValueError: saved by another world size, ZeRO stage, precision or model; the message names the differences.
        """
        self.runtime.heartbeat.mark("load")
        state = load_state(self._wrapped, self.config, self.runtime, path)
        self.step = state["step"]
        self._guard.load_state_dict(state["guard"])
        if self._average is not None:
            self._average.load(path / ema.file_name(self.runtime.rank), state.get("ema_updates", 0))

    def full_state_dict(self) -> dict[str, Tensor]:
        """All parameters in fp32 and persistent buffers, on the CPU of the main rank; {} on the others.

        Gathered one at a time, so that a GPU never holds more than the largest parameter besides its own share.
        """
        return full_state_dict(self._wrapped, self.runtime)

    def averaged_state_dict(self) -> dict[str, Tensor] | None:
        """As `full_state_dict`, of the averaged weights; None where no average is kept."""
        if self._average is None:
            return None
        with self._average.in_place():
            return self.full_state_dict()

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._wrapped.destroy()

    def _accumulate(self, micro_batches: Iterable[Batch]) -> tuple[list[Batch], list[Tensor]]:
        """Forward and backward of every micro-batch; the last one makes DeepSpeed update."""
        batches: list[Batch] = []
        losses: list[Tensor] = []
        for batch in micro_batches:
            assert len(batches) < self._accumulation, f"more than {self._accumulation} micro-batches were given to one step"
            batches.append(batch)
            loss = self._wrapped(batch)["loss"]
            losses.append(loss.detach())
            self._backward(loss, losses)
            self._wrapped.step()
        assert len(batches) == self._accumulation, f"a step takes {self._accumulation} micro-batches, got {len(batches)}"
        return batches, losses

    def _backward(self, loss: Tensor, losses: list[Tensor]) -> None:
        if len(losses) == self._accumulation:
            # A loss that is not finite can still have finite gradients (an infinite target does). This factor is exactly 1
            # while all losses of the step are finite, else NaN: it spoils the gradients, which every stage checks over all ranks.
            loss = loss * (1.0 + 0.0 * torch.stack(losses).sum())
        self._wrapped.backward(self._scaler.scale(loss) if self._scaler else loss)

    def _account(self, skipped: bool, loss: float, batches: list[Batch], losses: list[Tensor], scale: float | None) -> str | None:
        """Count what happened; name the source when the step was skipped for a reason that needs attention."""
        if not skipped:
            assert math.isfinite(loss), f"step {self.step} was applied although its loss is {loss}"
            self._guard.finite()
            return None
        if self._scaler and math.isfinite(loss):
            if scale is not None and scale <= self.config.fp16_min_scale:
                self._guard.overflow_at_floor(self.step, scale)
            return None  # the scale was halved: fp16's normal course
        source = self._diagnose(batches, losses)
        if self.runtime.is_main:
            logger.warning("step %d skipped: loss %g, not finite first in %s", self.step, loss, source)
        self._guard.nonfinite(self.step, source)
        return source

    def _diagnose(self, batches: list[Batch], losses: list[Tensor]) -> str:
        """Run the forward again with hooks, in step with the other ranks, and name the first module that is not finite."""
        bad = [index for index, loss in enumerate(losses) if not bool(torch.isfinite(loss))]
        first = int(self.runtime.min_ranks(bad[0] if bad else len(batches)))
        if first == len(batches):  # the losses were finite: look at the last micro-batch, else it was in backward
            first -= 1
        batch = batches[first]
        name = first_nonfinite_module(self.module, lambda: self._wrapped(batch))
        names = [found for found in self.runtime.gather_objects(name) if found is not None]
        if names:
            return names[0]
        return "gradients" if not self.runtime.any_rank(bool(bad)) else "loss"

    def _grad_norm(self, skipped: bool, scale: float | None) -> float:
        norm = self._wrapped.get_global_grad_norm()
        if skipped or norm is None:
            return math.inf
        return float(norm) / (scale if self._scaler and self._scaler.by_hand else 1.0)


class LossScale:
    """fp16's dynamic loss scale, held by DeepSpeed's optimizer of the stage."""

    def __init__(self, wrapped: Any, config: EngineConfig) -> None:
        self._optimizer = wrapped.optimizer
        # Stage 0's wrapper divides gradients by the scale, but nobody multiplies the loss by it (DeepSpeed 0.19.8:
        # engine.backward scales for ZeRO optimizers only), and the norm that it reports is the scaled one.
        self.by_hand = config.zero_stage == 0
        scaler = getattr(self._optimizer, "loss_scaler", None)
        if scaler is not None:
            scaler.raise_error_at_min_scale = False  # a bare Exception without advice; the guard raises ours

    @property
    def value(self) -> float:
        return float(self._optimizer.loss_scale)

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.value if self.by_hand else loss


def _check_batch(micro_batch: int, accumulation: int, global_batch: int, world_size: int) -> None:
    product = micro_batch * accumulation * world_size
    if product != global_batch:
        raise ValueError(
            f"global_batch: must be micro_batch * accumulation * ranks = {micro_batch} * {accumulation} * {world_size},"
            f" got {global_batch}. Let the plan compute these numbers for this world size."
        )
