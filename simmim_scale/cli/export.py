"""`simmim export`: finds the weights, or the newest complete save of a run that goes on, and says what came of the export."""

from pathlib import Path

from rich.console import Console

from simmim_scale.config.load import load_config
from simmim_scale.engine.checkpoint import SavedState, complete_saves
from simmim_scale.engine.consolidate import consolidate
from simmim_scale.models.weights import Weights, load_weights
from simmim_scale.reports.sinks import last_metrics
from simmim_scale.tasks.export import Exported, export_weights, verification_lines
from simmim_scale.tasks.export.records import Source
from simmim_scale.tasks.pretrained import as_pretrained, find_weights
from simmim_scale.train.run_directory import RunDirectory


def export_and_report(directory: Path, out: Path, *, to: str, console: Console) -> Exported:
    """Exports a run or portable weights and prints how close the result is. Raises ValueError as `export_weights`."""
    weights = read_weights(directory)
    run = _run_of(directory)
    console.print(f"{directory}: weights of step {weights.extra.get('step', 'unknown')}, from {weights.path}", markup=False)
    metrics = last_metrics(run.metrics) if run else {}
    exported = export_weights(Source(as_pretrained(weights), weights.state, metrics), out, to=to)
    for line in (*exported.notes, *verification_lines(exported)):
        console.print(f"  {line}", markup=False)
    console.print(f"written to {exported.directory}; its README.md says how to load it", markup=False)
    return exported


def read_weights(directory: Path) -> Weights:
    """The weights in a directory, or, of a run that has not written any, those of its newest complete save.

    A save is read with the configuration of its run, so it is looked for in the directory of a run alone.

    Raises:
        ValueError: nothing there.
    """
    run = RunDirectory(directory)
    saved = newest_save(run)
    if saved is None or run.weights.is_dir():
        return load_weights(find_weights(directory))
    config = load_config(run.config)
    facts = {"step": str(saved.step), **saved.client_state.get("weight_facts", {})}
    return Weights(path=saved.path, state=consolidate(saved.path), config=config.model_dump(mode="json"), extra=facts)


def newest_save(run: RunDirectory) -> SavedState | None:
    """The complete save with the highest step of a run; None where there is none, or no run."""
    if not run.config.is_file():
        return None
    return max(complete_saves(run.checkpoints), key=lambda saved: saved.step, default=None)


def _run_of(directory: Path) -> RunDirectory | None:
    """The run that the directory is, or whose weights it holds."""
    candidates = (RunDirectory(path) for path in (directory, directory.resolve().parent))
    return next((run for run in candidates if run.metrics.is_file()), None)
