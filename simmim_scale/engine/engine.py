"""The engine: one training step, one evaluation step, saving and loading, over DeepSpeed's stages 0 to 3.

Read `Engine.launch_step` and `Engine.finish_step` first. A step with a non-finite loss or gradient is skipped on all ranks:
parameters and optimizer state stay as they were, while the step counter, and with it the learning rate and the samples, moves on.

Launching reads nothing back from a GPU: what a step amounted to (loss, norm, whether a rank was asked to stop) is reduced and
copied on the device's queue, and `finish_step` reads it, which the loop does one step late. In stage 0 with fp32 and stage 2 with
bf16 nothing in a step makes the host wait: the optimizer clips and skips on the device. What DeepSpeed (0.19.8) asks elsewhere
was read in its source and is counted in tests/multiprocess/test_engine.py: whether the norm is finite (stages 1 and 3), once more
per parameter group for clipping in fp32, a constant per group; fp16 must know its loss scale; stage 0 in bf16 or fp16 asks per
parameter (stage 2 holds the same on one rank); and between ranks, overlapped reductions of stages 1 and 2 end in a wait.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from simmim_scale.config.schema import EngineConfig, OptimizerConfig
from simmim_scale.engine.activation_checkpointing import apply_activation_checkpointing
from simmim_scale.engine.compilation import compile_blocks
from simmim_scale.engine.deepspeed_config import deepspeed_config, guards_itself
from simmim_scale.engine.ema import WeightAverage, master_weights
from simmim_scale.engine.fp8 import convert_to_fp8, require_fp8
from simmim_scale.engine.full_state import full_state_dict
from simmim_scale.engine.guard import NonFiniteGuard, first_nonfinite_module
from simmim_scale.engine.host_copy import HostCopy
from simmim_scale.engine.offload import prepare_offload
from simmim_scale.engine.optim import GuardedStep, build_adamw, parameter_groups
from simmim_scale.engine.precision import require_precision
from simmim_scale.engine.runtime import Runtime
from simmim_scale.engine.schedule import set_learning_rate
from simmim_scale.engine.sequential_attention import apply_sequential_attention
from simmim_scale.engine.state import Snapshot, load_state, take_snapshot
from simmim_scale.engine.zero_leaves import mark_leaves, model_sizes
from simmim_scale.engine.zero_settings import ModelSizes
from simmim_scale.kernels.optimizer import AdamWForm, choose_optimizer

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
        stop: some rank was asked to stop when it launched this step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    skipped: bool
    nonfinite_source: str | None
    loss_scale: float | None
    nonfinite_steps: int
    stop: bool = False


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device may still be busy with. `finish_step` makes a `StepResult` of it.

    Attributes:
        batches, losses: this rank's micro-batches and their losses, kept to diagnose a step that was not finite.
        numbers: [sum of the ranks' losses, number of ranks that were asked to stop, gradient norm].
        deepspeed_skipped: DeepSpeed itself found the step not finite, which it knows on the host.
    """

    step: int
    lr: float
    scale: float | None
    batches: "list[Batch]"
    losses: list[Tensor]
    numbers: HostCopy
    deepspeed_skipped: bool


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
    adamw: str = "auto",
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
        adamw: form of the optimizer, a name of `kernels/dispatch.py`.
        extra: the config's `deepspeed:` section.
    Raises:
        ValueError: the device lacks the precision, `extra` sets a key we own, the batch numbers do not multiply, or the form of
            the optimizer cannot run here.
    """
    import deepspeed

    require_precision(engine.precision, runtime.device)
    prepare_offload(engine, runtime.rank)
    require_fp8(engine, runtime.device)
    _check_batch(micro_batch, accumulation, global_batch, runtime.world_size)
    # An offloaded optimizer updates in CPU memory.
    form = choose_optimizer(adamw, device=runtime.device if engine.offload_optimizer == "none" else torch.device("cpu"))
    _check_form(adamw, form, engine)

    def settings(sizes: ModelSizes | None) -> dict[str, Any]:
        return deepspeed_config(
            engine,
            optimizer,
            micro_batch=micro_batch,
            accumulation=accumulation,
            global_batch=global_batch,
            sizes=sizes,
            world_size=runtime.world_size,
            extra=extra,
        )

    torch.manual_seed(seed)
    with deepspeed.zero.Init(config_dict_or_path=settings(None), enabled=engine.zero_stage == 3):
        module = build_module()
    module.train()
    # Before the blocks' classes change: a block is gathered whole, so it is one leaf for ZeRO-3.
    mark_leaves(module, engine)
    convert_to_fp8(module, engine.fp8)
    apply_sequential_attention(module, engine.sequential_attention)
    compile_blocks(module, engine.compile, runtime.device)
    apply_activation_checkpointing(
        module, engine.activation_checkpointing, engine.checkpointing_backend, pin_memory=runtime.device.type == "cuda"
    )
    own = guards_itself(engine)
    groups = parameter_groups(module, optimizer.weight_decay, lr_scales(module) if lr_scales else None)
    optim = build_adamw(groups, optimizer, form, guards=own)
    config = settings(model_sizes(module))
    wrapped, *_ = deepspeed.initialize(model=module, optimizer=optim, config=config, dist_init_required=False)
    optim.armed = True
    if engine.zero_stage == 0 and runtime.world_size == 1:
        # DeepSpeed would gather all gradients in one buffer, sum it over the one rank, and copy it back.
        wrapped.enable_backward_allreduce = False
    average = WeightAverage(master_weights(wrapped), ema_decay) if ema_decay else None
    guard = NonFiniteGuard(max_nonfinite_steps)
    return Engine(wrapped, engine, lr, accumulation, runtime, guard, own=optim if own else None, average=average)


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
        *,
        own: GuardedStep | None,
        average: WeightAverage | None = None,
    ) -> None:
        self.step = 0
        self._in_flight = 0  # launched and not finished
        self.config = config
        self.runtime = runtime
        self._wrapped = wrapped
        self._lr = lr
        self._accumulation = accumulation
        self._guard = guard
        self._average = average
        self._own = own  # our optimizer where it guards itself
        self._scaler = LossScale(wrapped, config) if config.precision == "fp16" else None

    @property
    def module(self) -> nn.Module:
        """The module itself. Under ZeRO-3 its parameters are partitioned: shapes are in `ds_shape`."""
        return self._wrapped.module

    def train_step(self, micro_batches: Iterable[Batch]) -> StepResult:
        """Launch a step and wait for what it amounted to."""
        return self.finish_step(self.launch_step(micro_batches))

    def launch_step(self, micro_batches: Iterable[Batch], *, stop: Callable[[], bool] = lambda: False) -> LaunchedStep:
        """Queue one optimizer update from this rank's `accumulation` micro-batches, already on the device.

        Args:
            stop: whether this rank was asked to stop; called once, when everything is queued.
        """
        self.runtime.heartbeat.mark("train")
        lr = self._lr(self.step)
        scale = self._scaler.value if self._scaler else None
        set_learning_rate(self._wrapped.optimizer, lr)
        batches, losses = self._accumulate(micro_batches)
        skipped = bool(getattr(self._wrapped.optimizer, "overflow", False))
        numbers = HostCopy(self._numbers(losses, stop(), skipped))
        self.step += 1
        self._in_flight += 1
        if self._average and not skipped and math.isfinite(numbers.read()[-1]):  # an average asks: it counts applied steps
            self._average.update()
        return LaunchedStep(self.step, lr, scale, batches, losses, numbers, skipped)

    def finish_step(self, launched: LaunchedStep) -> StepResult:
        """What a launched step amounted to; steps are finished in the order of their launches.

        A step that was not finite is diagnosed by running its forward again, with the parameters of now: they are those of that
        step, unless a later launch was finite and has moved them on.

        Raises:
            NonFiniteError: too many skipped steps in a row.
            LossScaleError: fp16 overflowed at the smallest loss scale.
        """
        self._in_flight -= 1
        total, stops, norm = launched.numbers.read()
        loss = total / self.runtime.world_size
        skipped = launched.deepspeed_skipped or not math.isfinite(norm)
        source = self._account(launched, skipped, loss)
        by_hand = launched.scale if self._scaler and self._scaler.by_hand else None
        norm = math.inf if skipped else norm / (by_hand or 1.0)
        self.runtime.heartbeat.mark("between", launched.step)  # records, waiting for data
        return StepResult(
            launched.step, loss, launched.lr, norm, skipped, source, launched.scale, self._guard.total, stop=stops > 0
        )

    def evaluate_step(self, batch: Batch) -> dict[str, Tensor]:
        """The module's outputs for a batch, in eval mode and without gradients. Every rank calls it equally often."""
        self.runtime.heartbeat.mark("validate")
        self._wrapped.eval()
        try:
            with torch.no_grad():
                return self._wrapped(batch)
        finally:
            self._wrapped.train()

    def snapshot(self) -> Snapshot:
        """The run state, to be written (engine/checkpoint.py does) before the next step, or copied."""
        assert not self._in_flight, f"{self._in_flight} steps are not finished: the count of skipped steps would be short"
        self.runtime.heartbeat.mark("save")
        state: dict[str, Any] = {"step": self.step, "guard": self._guard.state_dict()}
        if self._average is None:
            return take_snapshot(self._wrapped, self.config, self.runtime, state)
        state["ema_updates"] = self._average.updates
        return take_snapshot(self._wrapped, self.config, self.runtime, state, averages=self._average.tensors)

    def load(self, path: Path) -> None:
        """Continue from a written snapshot, of any number of ranks and any ZeRO stage.

        Raises:
            ValueError: another precision or another model; the message names the differences.
        """
        self.runtime.heartbeat.mark("load")
        averages = self._average.tensors if self._average else []
        state = load_state(self._wrapped, self.config, self.runtime, path, averages=averages)
        self.step = state["step"]
        self._guard.load_state_dict(state["guard"])
        if self._average is not None:
            self._average.updates = state["ema_updates"]

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
            with record_function("optimizer"):  # for profilers: bench/step_profile.py
                if self._own is not None and self.config.zero_stage > 0 and len(batches) == self._accumulation:
                    self._own.measured_norm = self._sharded_norm()
                self._wrapped.step()
        assert len(batches) == self._accumulation, f"a step takes {self._accumulation} micro-batches, got {len(batches)}"
        return batches, losses

    def _backward(self, loss: Tensor, losses: list[Tensor]) -> None:
        if len(losses) == self._accumulation:
            # A loss that is not finite can still have finite gradients (an infinite target does). This factor is exactly 1
            # while all losses of the step are finite, else NaN: it spoils the gradients, which every stage checks over all ranks.
            loss = loss * (1.0 + 0.0 * torch.stack(losses).sum())
        self._wrapped.backward(self._scaler.scale(loss) if self._scaler else loss)

    def _sharded_norm(self) -> Tensor:
        """L2 norm of the averaged gradients, of which stage 2 has left each rank its part. The same on all ranks."""
        held = [gradient for part in self._wrapped.optimizer.averaged_gradients.values() for gradient in part or ()]
        return self.runtime.sum_in_place(torch.nn.utils.get_total_norm(held).float().square()).sqrt()

    def _numbers(self, losses: list[Tensor], stop: bool, skipped: bool) -> Tensor:
        """What `LaunchedStep.numbers` lists, on the device, with one reduction. `full` takes its value without a copy."""
        device = losses[0].device
        loss = torch.stack(losses).double().mean()[None]
        summed = self.runtime.sum_in_place(torch.cat([loss, torch.full((1,), float(stop), dtype=torch.float64, device=device)]))
        norm = self._wrapped.get_global_grad_norm() if self._own is None else self._own.last_norm
        if skipped or not isinstance(norm, Tensor):
            norm = torch.full((1,), math.inf if skipped or norm is None else float(norm), device=device)
        return torch.cat([summed, norm.detach().reshape(1).double()])

    def _account(self, launched: LaunchedStep, skipped: bool, loss: float) -> str | None:
        """Count what happened; name the source when the step was skipped for a reason that needs attention."""
        if not skipped:
            assert math.isfinite(loss), f"step {launched.step} was applied although its loss is {loss}"
            self._guard.finite()
            return None
        if self._scaler and math.isfinite(loss):
            if launched.scale is not None and launched.scale <= self.config.fp16_min_scale:
                self._guard.overflow_at_floor(launched.step, launched.scale)
            return None  # the scale was halved: fp16's normal course
        source = self._diagnose(launched.batches, launched.losses)
        if self.runtime.is_main:
            logger.warning("step %d skipped: loss %g, not finite first in %s", launched.step, loss, source)
        self._guard.nonfinite(launched.step, source)
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


def _check_form(name: str, form: AdamWForm, engine: EngineConfig) -> None:
    """DeepSpeed's stage 0 treats NVIDIA's and its own FusedAdam apart, with flat masters that our saves do not know."""
    if engine.zero_stage == 0 and engine.precision != "fp32" and form.cls.__name__ == "FusedAdam":
        raise ValueError(
            f"kernels.optimizer: {name} needs engine.zero_stage 1, 2 or 3 in {engine.precision}, got stage 0."
            " Stage 1 holds the same on one rank; or choose torch_fused."
        )


def _check_batch(micro_batch: int, accumulation: int, global_batch: int, world_size: int) -> None:
    product = micro_batch * accumulation * world_size
    if product != global_batch:
        raise ValueError(
            f"global_batch: must be micro_batch * accumulation * ranks = {micro_batch} * {accumulation} * {world_size},"
            f" got {global_batch}. Let the plan compute these numbers for this world size."
        )
