"""`simmim pretrain` (and every other training command): from a configuration file to a finished, preempted or failed run.

`train` is the whole story in order; the functions below it build the pieces. What can be wrong with the input is found before
the engine is built.
"""

import logging
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TypeVar

from simmim_scale.cli import exit_codes
from simmim_scale.cli.describe import describe_model, plan_rows
from simmim_scale.cli.exit_codes import user_errors
from simmim_scale.config.load import load_config
from simmim_scale.config.plan import Plan, make_plan
from simmim_scale.config.schema import Config
from simmim_scale.engine.checkpoint import RunStateStore, SavedState
from simmim_scale.engine.engine import Engine, build_engine
from simmim_scale.engine.guard import LossScaleError, NonFiniteError
from simmim_scale.engine.precision import require_precision
from simmim_scale.engine.runtime import Runtime, start_runtime
from simmim_scale.kernels import dispatch
from simmim_scale.models.weights import load_into, load_weights, save_weights
from simmim_scale.reports.environment import describe_device, describe_machine, git_version, package_versions
from simmim_scale.reports.page import write_report
from simmim_scale.reports.records import OpRow, RunHeader
from simmim_scale.reports.sinks import Sinks, make_sinks
from simmim_scale.reports.terminal import Terminal, configure_logging
from simmim_scale.reports.throughput import Throughput, device_peak_flops, training_flops_per_image
from simmim_scale.tasks import build_task
from simmim_scale.tasks.pretrain import PretrainTask
from simmim_scale.tasks.pretrained import find_weights
from simmim_scale.train.loop import Loop, Outcome, cadence, fit
from simmim_scale.train.run_directory import RunDirectory
from simmim_scale.train.stop import StopRequest

log = logging.getLogger(__name__)
T = TypeVar("T")


def train(config_path: Path, overrides: Sequence[str], *, tasks: Sequence[str], stop: StopRequest) -> int:
    """Runs or resumes the training that a configuration describes; returns the exit code.

    Args:
        tasks: names of the tasks that the command may train.
        stop: an installed handler of stop signals.
    """
    with user_errors():
        config = load_config(config_path, overrides)
        _check_task(config, tasks)
    # DeepSpeed 0.19.8 calls collectives that torch 2.14 renamed: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    runtime = start_runtime(config.engine.timeout_minutes)
    try:
        return _train_here(config, runtime, stop)
    finally:
        runtime.close()


def _train_here(config: Config, runtime: Runtime, stop: StopRequest) -> int:
    terminal = Terminal()
    configure_logging(terminal, level=logging.INFO if runtime.is_main else logging.WARNING)
    directory = RunDirectory(Path(config.run_dir))
    with user_errors(quiet=not runtime.is_main):
        require_precision(config.engine.precision, runtime.device)
        task = build_task(config)
        plan = make_plan(
            config.train, config.optimizer, config.schedule, num_samples=task.num_samples, world_size=runtime.world_size
        )
        lock = _on_main(runtime, lambda: _claim(directory, config))
        store = RunStateStore(directory.checkpoints, runtime, config.checkpoint)
        saved = store.newest()
        _check_samples(saved, task)
        start_step = saved.step if saved else 0
        header = _header(config, plan, runtime, start_step)
        sinks = _on_main(runtime, lambda: _sinks(config, directory, plan, start_step, terminal)) or Sinks()
    with sinks:
        with user_errors(quiet=not runtime.is_main):
            engine = _engine(config, task, plan, runtime, saved, store)
        sinks.write_header(header)
        try:
            with task.training_loader(
                plan,
                rank=runtime.rank,
                start_step=engine.step,
                quarantine=directory.path / "quarantine",
                pin_memory=runtime.device.type == "cuda",
            ) as loader:
                loop = _loop(config, task, plan, engine, runtime, loader, store, sinks, stop, directory)
                outcome = fit(loop)
            if outcome is Outcome.FINISHED:
                _finish(config, engine, runtime, directory)
        except (NonFiniteError, LossScaleError) as error:
            log.error("%s", error)
            return exit_codes.NONFINITE
        finally:
            engine.destroy()
            if lock is not None:
                lock.close()
    if outcome is Outcome.PREEMPTED:
        log.warning("%s: saved at step %d. Run the same command again to go on.", stop.received or "stop", engine.step)
        return exit_codes.PREEMPTED
    return exit_codes.FINISHED


# ----------------------------------------------------------------------------------------------------- before training


def _check_task(config: Config, tasks: Sequence[str]) -> None:
    if config.task not in tasks and ":" not in config.task:
        raise ValueError(f"task: this command trains {' or '.join(tasks)}, got {config.task!r}. Use the command of that task.")


def _on_main(runtime: Runtime, action: Callable[[], T]) -> T | None:
    """Runs `action` on the main rank; its ValueError is raised on every rank, so that all of them leave together."""
    result: T | None = None
    problem: str | None = None
    if runtime.is_main:
        try:
            result = action()
        except ValueError as error:
            problem = str(error)
    problem = runtime.broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)
    return result


def _claim(directory: RunDirectory, config: Config) -> IO[str]:
    directory.check(config)
    return directory.claim(config)


def _check_samples(saved: SavedState | None, task: PretrainTask) -> None:
    if saved is None or saved.client_state.get("num_samples") == task.num_samples:
        return
    raise ValueError(
        f"data.train: the run was saved with {saved.client_state.get('num_samples')} samples, the shards hold {task.num_samples}."
        " Positions would no longer mean the same samples. Restore the shards, or start another run_dir with init_from."
    )


def _sinks(config: Config, directory: RunDirectory, plan: Plan, start_step: int, terminal: Terminal) -> Sinks:
    return make_sinks(
        config.report,
        directory.path,
        total_steps=plan.total_steps,
        start_step=start_step,
        config=config.model_dump(mode="json"),
        terminal=terminal,
    )


def _engine(
    config: Config, task: PretrainTask, plan: Plan, runtime: Runtime, saved: SavedState | None, store: RunStateStore
) -> Engine:
    # Read before anything is built: wrong weights should cost seconds.
    initial = load_weights(find_weights(config.init_from)) if config.init_from and saved is None else None

    def build_module():
        module = task.build_module()
        if initial is not None:
            load_into(module, initial.state, source=str(config.init_from))
        return module

    engine = build_engine(
        build_module,
        engine=config.engine,
        optimizer=config.optimizer,
        lr=plan.lr,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        global_batch=plan.global_batch,
        runtime=runtime,
        seed=config.seed,
        max_nonfinite_steps=config.train.max_nonfinite_steps,
        extra=config.deepspeed,
    )
    if saved is not None:
        store.load(engine, saved)
    return engine


def _header(config: Config, plan: Plan, runtime: Runtime, start_step: int) -> RunHeader:
    model = describe_model(config)
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.engine.precision]
    import torch

    ops = dispatch.describe(config.kernels.model_dump(), device=runtime.device, dtype=getattr(torch, dtype))
    return RunHeader(
        run_dir=config.run_dir,
        command=shlex.join(["simmim", *sys.argv[1:]]),
        device=describe_device(runtime.device),
        world_size=runtime.world_size,
        git=git_version(),
        versions=package_versions(),
        machine=describe_machine(),
        ops=tuple(OpRow(**row) for row in ops),
        plan={
            "model": f"{model['backbone']}, {model['parameters'] / 1e6:.1f}M parameters,"
            f" {model['multiply_adds'] / 1e9:.2f}G multiply-adds",
            "engine": f"ZeRO-{config.engine.zero_stage}, {config.engine.precision},"
            f" activation checkpointing {config.engine.activation_checkpointing}",
            **plan_rows(plan),
        },
        start_step=start_step,
    )


def _loop(config, task, plan, engine, runtime, loader, store, sinks, stop, directory) -> Loop:
    multiply_adds = describe_model(config)["multiply_adds"]
    device_name = describe_device(runtime.device)
    peak = (
        config.report.peak_tflops * 1e12 if config.report.peak_tflops else device_peak_flops(device_name, config.engine.precision)
    )
    return Loop(
        engine=engine,
        plan=plan,
        runtime=runtime,
        loader=loader,
        validation=task.validation(plan, rank=runtime.rank, module=engine.module, run_dir=directory.path),
        validate=cadence(config.validation.every_steps, plan),
        save=cadence(config.checkpoint.every_steps, plan),
        store=store,
        sinks=sinks,
        meter=Throughput(
            plan.global_batch,
            flops_per_image=training_flops_per_image(multiply_adds),
            peak_flops=peak * runtime.world_size if peak else None,
        ),
        stop=stop,
        facts={"num_samples": task.num_samples},
    )


# ------------------------------------------------------------------------------------------------------ after training


def _finish(config: Config, engine: Engine, runtime: Runtime, directory: RunDirectory) -> None:
    """Portable weights, the last pictures and the report page; says where they are."""
    state = engine.full_state_dict()
    if not runtime.is_main:
        return
    save_weights(directory.weights, state, config.model_dump(mode="json"), {"step": str(engine.step)})
    pictures = sorted(directory.gallery.glob("step_*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], directory.reconstructions)
    write_report(directory.path)
    log.info("finished at step %d. Look at:", engine.step)
    for path, what in (
        (directory.reconstructions, "original | masked | prediction"),
        (directory.report, "curves, pictures over training, configuration"),
        (directory.weights, "portable weights, for simmim_scale.load and init_from"),
    ):
        if path.exists():
            log.info("  %s  (%s)", path, what)
