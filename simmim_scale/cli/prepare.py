"""Everything between a configuration and the first step: what a run consists of, checked and built in an order that finds wrong
input before it costs time.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from torch import nn

from simmim_scale.cli.describe import plan_rows
from simmim_scale.cli.initial import load_initial_weights, with_pretrained_windows
from simmim_scale.cli.resume import describe_resume
from simmim_scale.cli.together import on_every_rank, on_main
from simmim_scale.config.plan import Plan, make_plan
from simmim_scale.config.schema import Config
from simmim_scale.engine.checkpoint import RunStateStore, SavedState
from simmim_scale.engine.engine import Engine, build_engine
from simmim_scale.engine.precision import DTYPES, require_precision
from simmim_scale.engine.runtime import Runtime
from simmim_scale.kernels import dispatch
from simmim_scale.models.layer_decay import layer_scales
from simmim_scale.models.norms import use_norm_kernels
from simmim_scale.models.weights import Weights
from simmim_scale.reports.environment import describe_device, describe_machine, git_version, package_versions
from simmim_scale.reports.records import OpRow, RunHeader
from simmim_scale.reports.sinks import Sinks, make_sinks
from simmim_scale.reports.terminal import Terminal
from simmim_scale.reports.throughput import Throughput, device_peak_flops, training_flops_per_image
from simmim_scale.tasks import build_task
from simmim_scale.tasks.classification import ClassificationTask
from simmim_scale.tasks.classification.probing import open_probe_sets
from simmim_scale.tasks.model_facts import describe_model
from simmim_scale.tasks.pretrain import PretrainTask
from simmim_scale.train.rollbacks import Rollback, read_rollbacks, skipped_at
from simmim_scale.train.run_directory import RunDirectory

Task = PretrainTask | ClassificationTask


@dataclass(frozen=True)
class Prepared:
    """A run whose input was found to be right; nothing is built yet.

    Attributes:
        saved: the run state to resume from, or None for a new run.
        initial: weights to start from, fitted to the model's window and image size, or None.
        resized: what was changed for that, one line each.
        rollbacks: returns to earlier states that the run has made.
        lock: keeps other processes out of the run directory; None on all ranks but the main one.
    """

    config: Config
    runtime: Runtime
    directory: RunDirectory
    task: Task
    plan: Plan
    store: RunStateStore
    saved: SavedState | None
    initial: Weights | None
    resized: list[str]
    rollbacks: tuple[Rollback, ...]
    lock: IO[str] | None

    @property
    def start_step(self) -> int:
        return self.saved.step if self.saved else 0

    @property
    def start_position(self) -> int:
        """Samples of the stream that are done with: trained on, or passed over after a rollback."""
        return self.plan.position_at(self.start_step) + self.skipped_samples

    @property
    def skipped_samples(self) -> int:
        return skipped_at(self.rollbacks, self.start_step)

    @cached_property
    def model_facts(self) -> dict[str, Any]:
        """Sizes of the model, counted once: the header shows them, the meter needs them for MFU."""
        return describe_model(self.config)


def prepare(config: Config, runtime: Runtime) -> Prepared:
    """Opens the data, makes the plan, claims the run directory and finds what to resume from. Collective.

    Raises:
        ValueError: on all ranks alike, saying what is wrong.
    """
    directory = RunDirectory(Path(config.run_dir))
    config = on_every_rank(runtime, lambda: with_pretrained_windows(config, directory))
    task, plan = on_every_rank(runtime, lambda: _open(config, runtime))
    lock = on_main(runtime, lambda: _claim(directory, config))
    store = RunStateStore(directory.checkpoints, runtime, config.checkpoint)
    try:
        saved = store.newest()
        initial, resized = on_every_rank(runtime, lambda: _check_state(config, task, saved))
        rollbacks = on_every_rank(runtime, lambda: tuple(read_rollbacks(directory.path)))
    except ValueError:
        if lock is not None:
            lock.close()
        raise
    return Prepared(config, runtime, directory, task, plan, store, saved, initial, resized, rollbacks, lock)


def _open(config: Config, runtime: Runtime) -> tuple[Task, Plan]:
    require_precision(config.engine.precision, runtime.device)
    task = build_task(config)
    open_probe_sets(config)  # opened again where they are read; here so that an error in them comes before any work
    plan = make_plan(config.train, config.optimizer, config.schedule, num_samples=task.num_samples, world_size=runtime.world_size)
    if isinstance(task, ClassificationTask):
        task.check_plan(plan)
    return task, plan


def _claim(directory: RunDirectory, config: Config) -> IO[str]:
    directory.check(config)
    return directory.claim(config)


def _check_state(config: Config, task: Task, saved: SavedState | None) -> tuple[Weights | None, list[str]]:
    """Makes sure that a save fits the data; reads the weights to start from, where there is no save."""
    if saved is None:
        return load_initial_weights(config)
    if saved.client_state.get("num_samples") != task.num_samples:
        raise ValueError(
            f"data.train: the run began with {saved.client_state.get('num_samples')} samples, the shards hold {task.num_samples}."
            " Positions would no longer mean the same samples. Restore the shards, or start another run_dir with init_from."
        )
    return None, []


def build(run: Prepared) -> Engine:
    """The engine with its module, at the step to go on from. Collective.

    Raises:
        ValueError: weights or a save that do not fit the model.
    """
    config, plan = run.config, run.plan

    def build_module() -> nn.Module:
        module = run.task.build_module()
        use_norm_kernels(module, config.kernels.norm)
        if run.initial is not None:
            run.task.load_initial(module, run.initial)
        return module

    engine = build_engine(
        build_module,
        engine=config.engine,
        optimizer=config.optimizer,
        lr=plan.lr,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        global_batch=plan.global_batch,
        runtime=run.runtime,
        seed=config.seed,
        max_nonfinite_steps=config.train.max_nonfinite_steps,
        lr_scales=lambda module: layer_scales(module, config.optimizer.layer_decay),
        ema_decay=config.optimizer.ema_decay,
        adamw=config.kernels.optimizer,
        extra=config.deepspeed,
    )
    if run.saved is not None:
        run.store.load(engine, run.saved)
    return engine


def open_sinks(run: Prepared, terminal: Terminal) -> Sinks:
    """Where records go; on all ranks but the main one they go nowhere. Collective.

    Raises:
        ValueError: a package that was asked for is not installed, or an op has no implementation here.
    """
    sinks = on_main(
        run.runtime,
        lambda: make_sinks(
            run.config.report,
            run.directory.path,
            total_steps=run.plan.total_steps,
            start_step=run.start_step,
            config=run.config.model_dump(mode="json"),
            terminal=terminal,
        ),
    )
    return sinks or Sinks()


def make_header(run: Prepared) -> RunHeader:
    """What a person needs to know before the first step.

    Raises:
        ValueError: an op whose named implementation cannot run here.
    """
    config, model = run.config, run.model_facts
    ops = dispatch.describe(config.kernels.model_dump(), device=run.runtime.device, dtype=DTYPES[config.engine.precision])
    sizes = f"{model['parameters'] / 1e6:.1f}M parameters, {model['multiply_adds'] / 1e9:.2f}G multiply-adds"
    engine = config.engine
    return RunHeader(
        run_dir=config.run_dir,
        command=shlex.join(["simmim", *sys.argv[1:]]),
        device=describe_device(run.runtime.device),
        world_size=run.runtime.world_size,
        git=git_version(),
        versions=package_versions(),
        machine=describe_machine(),
        ops=tuple(OpRow(**row) for row in ops),
        plan={
            "model": f"{model['backbone']}, {sizes}",
            "engine": f"ZeRO-{engine.zero_stage}, {engine.precision}, activation checkpointing {engine.activation_checkpointing}",
            **_initial_rows(run),
            **plan_rows(run.plan),
            **rollback_rows(run.rollbacks),
            **({"resumes": describe_resume(run.saved, run.plan, engine)} if run.saved else {}),
        },
        start_step=run.start_step,
    )


def _initial_rows(run: Prepared) -> dict[str, str]:
    if run.initial is None:
        return {}
    return {"init_from": f"{run.config.init_from}: {'; '.join(run.resized) or 'unchanged'}"}


def make_meter(run: Prepared) -> Throughput:
    """Measures images per second, waiting, and MFU where the device's peak is known."""
    config, world_size = run.config, run.runtime.world_size
    known = device_peak_flops(describe_device(run.runtime.device), config.engine.precision)
    peak = config.report.peak_tflops * 1e12 if config.report.peak_tflops else known
    return Throughput(
        run.plan.global_batch,
        flops_per_image=training_flops_per_image(run.model_facts["multiply_adds"] + run.model_facts["head_multiply_adds"]),
        peak_flops=peak * world_size if peak else None,
    )


def rollback_rows(rollbacks: Sequence[Rollback]) -> dict[str, str]:
    """Each rollback in a few words, for the run header."""
    return {
        f"rollback {number}": f"from step {entry.from_step} to {entry.to_step}, passing over {entry.skipped_samples:,} samples:"
        f" {entry.reason}"
        for number, entry in enumerate(rollbacks, start=1)
    }
