"""`simmim pretrain` (and every other training command): from a configuration file to a finished, preempted or failed run.

`train` is the whole story in order; `prepare.py` has the pieces before the first step.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

from simmim_scale.cli import exit_codes
from simmim_scale.cli.exit_codes import user_errors
from simmim_scale.cli.prepare import Prepared, build, make_header, make_meter, open_sinks, prepare
from simmim_scale.cli.recovery import roll_back, spike_detector
from simmim_scale.cli.resume import resume_facts
from simmim_scale.cli.together import on_every_rank
from simmim_scale.config.load import load_config
from simmim_scale.config.schema import Config
from simmim_scale.data.dataset import LOAD_ERRORS
from simmim_scale.engine.engine import Engine
from simmim_scale.engine.guard import LossScaleError, NonFiniteError
from simmim_scale.engine.runtime import Runtime, start_runtime
from simmim_scale.models.weights import save_weights
from simmim_scale.reports.page import write_report
from simmim_scale.reports.sinks import Sinks, last_metrics
from simmim_scale.reports.terminal import Terminal, configure_logging
from simmim_scale.tasks.classification.probing import Probing, open_probe_sets
from simmim_scale.tasks.model_card import write_card
from simmim_scale.tasks.pretrained import CLASS_NAMES
from simmim_scale.train.ahead import LoadingError
from simmim_scale.train.loop import Cadence, Loop, Outcome, cadence, fit
from simmim_scale.train.spikes import LossSpikeError
from simmim_scale.train.stop import StopRequest

log = logging.getLogger(__name__)


def train(config_path: Path, overrides: Sequence[str], *, tasks: Sequence[str], stop: StopRequest) -> int:
    """Runs or resumes the training that a configuration describes; returns the exit code.

    Args:
        tasks: names of the tasks that the command may train.
        stop: an installed handler of stop signals.
    """
    with user_errors():
        config = load_config(config_path, overrides)
        if config.task not in tasks and ":" not in config.task:
            raise ValueError(f"task: this command trains {' or '.join(tasks)}, got {config.task!r}. Use its command.")
    # DeepSpeed 0.19.8 calls collectives that torch 2.14 renamed: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with user_errors():
        runtime = start_runtime(config.engine.timeout_minutes)
    try:
        return _train_here(config, runtime, stop)
    finally:
        runtime.close()


def _train_here(config: Config, runtime: Runtime, stop: StopRequest) -> int:
    terminal = Terminal()
    configure_logging(terminal, level=logging.INFO if runtime.is_main else logging.WARNING)
    with user_errors(quiet=not runtime.is_main):
        run = prepare(config, runtime)
    lock = run.lock
    try:
        while True:
            ended = _start(run, terminal, stop)
            if not isinstance(ended, Prepared):
                return ended
            run = ended
    finally:
        if lock is not None:
            lock.close()


def _start(run: Prepared, terminal: Terminal, stop: StopRequest) -> int | Prepared:
    """Trains from where the run is; returns the exit code, or the run as it goes on after a rollback."""
    with user_errors(quiet=not run.runtime.is_main):
        header = on_every_rank(run.runtime, lambda: make_header(run))
        sinks = open_sinks(run, terminal)
    with sinks:
        with user_errors(quiet=not run.runtime.is_main):
            engine = build(run)
        sinks.write_header(header)
        return _run(run, engine, sinks, stop)


def _run(run: Prepared, engine: Engine, sinks: Sinks, stop: StopRequest) -> int | Prepared:
    try:
        outcome = _fit(run, engine, sinks, stop)
        if outcome is Outcome.PREEMPTED:
            log.warning("%s: saved at step %d. Run the same command again to go on.", stop.received or "stop", engine.step)
            return exit_codes.PREEMPTED
        _finish(run, engine)
        return exit_codes.FINISHED
    except (NonFiniteError, LossSpikeError) as error:
        again = roll_back(run, step=engine.step, reason=str(error))
        if again is None:
            log.error("%s", error)
        return again or exit_codes.NONFINITE
    except LossScaleError as error:
        log.error("%s", error)
        return exit_codes.NONFINITE
    except LoadingError as error:
        log.error("no data for step %d: %s", engine.step + 1, error)
        log.error("What was trained is saved, step %d. Run the same command again when the data can be read.", engine.step)
        return exit_codes.NO_DATA
    finally:
        engine.destroy()


def _fit(run: Prepared, engine: Engine, sinks: Sinks, stop: StopRequest) -> Outcome:
    config, runtime, plan, directory = run.config, run.runtime, run.plan, run.directory
    with run.task.training_loader(
        plan,
        rank=runtime.rank,
        start_position=run.start_position,
        quarantine=directory.path / "quarantine",
        pin_memory=runtime.device.type == "cuda",
    ) as loader:
        loop = Loop(
            engine=engine,
            plan=plan,
            runtime=runtime,
            loader=loader,
            validation=run.task.validation(plan, rank=runtime.rank, module=engine.module, run_dir=directory.path),
            validate=cadence(config.validation.every_steps, plan),
            probing=_probing(run),
            probe=Cadence(every=config.probe.every_steps or plan.total_steps, last=plan.total_steps),
            save=cadence(config.checkpoint.every_steps, plan),
            store=run.store,
            sinks=sinks,
            meter=make_meter(run),
            stop=stop,
            facts={
                "num_samples": run.task.num_samples,
                "weight_facts": weight_facts(run),
                **resume_facts(plan, config.engine),
            },
            read_late=runtime.device.type == "cuda",
            skipped_samples=run.skipped_samples,
            spikes=spike_detector(run),
            load_errors=LOAD_ERRORS,
        )
        return fit(loop)


def _probing(run: Prepared) -> Probing | None:
    """What to probe with, or None where the configuration names no sets for it."""
    sets, config = open_probe_sets(run.config), run.config
    return sets and Probing(
        config=config,
        sets=sets,
        micro_batch=config.validation.micro_batch or run.plan.micro_batch,
        rank=run.runtime.rank,
        world_size=run.runtime.world_size,
        quarantine=run.directory.path / "quarantine",
    )


def weight_facts(run: Prepared) -> dict[str, str]:
    """What is kept beside the weights, for whoever uses them: the names of the classes, where there are any."""
    names = getattr(run.task, "class_names", ())
    return {CLASS_NAMES: json.dumps(names)} if names else {}


def _finish(run: Prepared, engine: Engine) -> None:
    """Portable weights, the last pictures and the report page; says where they are."""
    run.runtime.heartbeat.mark("finish", engine.step)
    state, averaged = engine.full_state_dict(), engine.averaged_state_dict()
    if not run.runtime.is_main:
        return
    directory, config = run.directory, run.config.model_dump(mode="json")
    facts = {"step": str(engine.step), **weight_facts(run)}
    metrics = last_metrics(directory.metrics)
    save_weights(directory.weights, state, config, facts)
    write_card(directory.weights, run.config, facts, metrics=metrics)
    if averaged is not None:
        save_weights(directory.averaged_weights, averaged, config, {**facts, "averaged": "true"})
        write_card(directory.averaged_weights, run.config, {**facts, "averaged": "true"}, metrics=metrics)
    pictures = sorted(directory.gallery.glob("step_*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], directory.reconstructions)
    write_report(directory.path)
    log.info("finished at step %d. Look at:", engine.step)
    for path, what in (
        (directory.reconstructions, "original | masked | prediction"),
        (directory.report, "curves, pictures over training, configuration"),
        (directory.weights, "portable weights, for simmim_scale.load and init_from"),
        (directory.averaged_weights, "the same, averaged over the steps"),
    ):
        if path.exists():
            log.info("  %s  (%s)", path, what)
