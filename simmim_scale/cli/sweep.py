"""`simmim sweep`: expands a sweep, carries it out or writes a job list, and collects what came of it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from simmim_scale.cli import exit_codes
from simmim_scale.sweeps.collect import Table, collect, tables
from simmim_scale.sweeps.expand import Run, check, expand
from simmim_scale.sweeps.page import write_results
from simmim_scale.sweeps.run import hostfile_script, launch_command, run_here, slurm_script, state_of
from simmim_scale.sweeps.spec import Sweep, load_sweep


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What `simmim sweep` is asked to do.

    Attributes:
        only: shell pattern of the runs' names; "*": all.
        reduced: the small form.
        ranks: of every training here, a number or auto.
        list_only: print runs and commands, train nothing.
        collect_only: collect, train nothing.
        slurm: file to write a Slurm array into, instead of training; at_once of its tasks run together, each on `nodes` nodes.
        jobs: file to write a job list for `hostfile` into, instead of training.
    """

    only: str = "*"
    reduced: bool = False
    ranks: str = "auto"
    list_only: bool = False
    collect_only: bool = False
    slurm: Path | None = None
    nodes: int = 1
    at_once: int = 4
    jobs: Path | None = None
    hostfile: str | None = None


def sweep_command(file: Path, overrides: Sequence[str], options: SweepOptions, console: Console) -> int:
    """Does what the options say; returns the exit code.

    Raises:
        ValueError: no sweep, an axis that names no setting, a pattern that fits no run.
    """
    sweep = load_sweep(file)
    everything = expand(sweep, file, overrides=overrides, reduced=options.reduced)
    sweep = sweep.in_small() if options.reduced else sweep
    runs = [run for run in everything if fnmatch(run.name, options.only)]
    if not runs:
        raise ValueError(
            f"--only: a pattern that fits a run, got {options.only!r}. Runs: {', '.join(run.name for run in everything)}."
        )
    check(runs)
    if options.list_only:
        _print_runs(runs, options.ranks, console)
        return exit_codes.FINISHED
    if options.slurm is not None or options.jobs is not None:
        _write_jobs(sweep, runs, options, console)
        return exit_codes.FINISHED
    code = exit_codes.FINISHED if options.collect_only else _carry_out(runs, options.ranks, console)
    results = collect(sweep, everything)
    for table in tables(sweep, everything, results):
        console.print(_rich(table))
    for path in write_results(sweep, everything, results):
        console.print(str(path))
    return code


def _carry_out(runs: Sequence[Run], ranks: str, console: Console) -> int:
    outcome = run_here(runs, ranks=ranks, say=lambda text: console.print(text, markup=False))
    for run, stage, code in outcome.failed:
        console.print(f"failed: {run.label} · {stage.stage} (exit code {code}); logs in {stage.run_dir}/logs", markup=False)
    if outcome.preempted:
        console.print("stopped; the same command goes on from here", markup=False)
        return exit_codes.PREEMPTED
    return exit_codes.FAILED if outcome.failed else exit_codes.FINISHED


def _write_jobs(sweep: Sweep, runs: Sequence[Run], options: SweepOptions, console: Console) -> None:
    if options.slurm is not None:
        text = slurm_script(runs, name=sweep.sweep, ranks=options.ranks, nodes=options.nodes, at_once=options.at_once)
        path, how = options.slurm, "sbatch"
    else:
        if options.hostfile is None:
            raise ValueError("--hostfile: needed with --jobs, got none. Give the file that names the nodes.")
        text = hostfile_script(runs, name=sweep.sweep, hostfile=options.hostfile)
        path, how = options.jobs, "bash"
    path.write_text(text)
    console.print(f"{len(runs)} runs; start them with: {how} {path}", markup=False)


def _print_runs(runs: Sequence[Run], ranks: str, console: Console) -> None:
    for run in runs:
        for stage in run.stages:
            console.print(f"# {run.label} · {stage.stage}: {state_of(stage).value}", markup=False)
            console.print(shlex.join(launch_command(stage, ranks=ranks)), markup=False)


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, box=None, header_style="dim")
    for number, heading in enumerate(table.headings):
        shown.add_column(heading, justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown
