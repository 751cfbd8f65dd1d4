"""Going back to the last save after a loss spike or too many non-finite steps, as the same start that a resume is."""

import logging
from dataclasses import replace

from simmim_scale.cli.prepare import Prepared
from simmim_scale.cli.together import on_main
from simmim_scale.reports.sinks import read_metrics
from simmim_scale.train.rollbacks import Rollback, add_rollback
from simmim_scale.train.spikes import SpikeDetector

log = logging.getLogger(__name__)


def spike_detector(run: Prepared) -> SpikeDetector | None:
    """What watches the loss, where the run may go back at all; it knows the losses before this start. Collective."""
    config = run.config.train.recovery
    if not config.rollbacks:
        return None
    detector = SpikeDetector(factor=config.spike_factor, window=config.spike_window, patience=config.spike_steps)
    records = read_metrics(run.directory.metrics) if run.runtime.is_main and run.directory.metrics.is_file() else []
    before = [record for record in records if record["step"] <= run.start_step and not record.get("skipped")]
    losses = [record["loss"] for record in before if record["loss"] is not None]
    detector.remember(run.runtime.broadcast_object(losses[-config.spike_window :]))
    return detector


def roll_back(run: Prepared, *, step: int, reason: str) -> Prepared | None:
    """The run as it goes on from its last save, passing over the samples since; None where it may not or cannot. Collective.

    Args:
        step: steps that were done, those in flight included.
        reason: what went wrong.
    """
    allowed, done = run.config.train.recovery.rollbacks, len(run.rollbacks)
    run.store.wait()  # a save that is still being written is the newest
    saved = run.store.newest()
    if saved is None or done >= allowed:
        why = "there is no save to go back to" if saved is None and allowed else f"train.recovery.rollbacks is {allowed}"
        if run.runtime.is_main:
            log.warning("not rolling back: %s", why)
        return None
    skipped = run.plan.position_at(step) - run.plan.position_at(saved.step)
    rollback = Rollback(from_step=step, to_step=saved.step, reason=reason, skipped_samples=skipped)
    on_main(run.runtime, lambda: add_rollback(run.directory.path, rollback))
    if run.runtime.is_main:
        log.warning(
            "%s. Rolling back to step %d and passing over %d samples (%d of %d).", reason, saved.step, skipped, done + 1, allowed
        )
    return replace(run, saved=saved, rollbacks=(*run.rollbacks, rollback))
