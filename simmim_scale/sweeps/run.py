"""Carrying out a sweep: one training after another here, or a job list for Slurm or for the nodes of a hostfile."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from simmim_scale.sweeps.expand import Run, StageRun

PREEMPTED = 75  # exit code of a training that was asked to stop and has saved
WEIGHTS = Path("weights", "model.safetensors")  # written when a training has finished
STARTED = "config.yaml"
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class State(Enum):
    """How far a training is."""

    NEW = "new"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"


@dataclass(frozen=True)
class Outcome:
    """How carrying out a sweep ended: trainings that failed, with their exit codes, and whether it was asked to stop."""

    failed: tuple[tuple[Run, StageRun, int], ...]
    preempted: bool


def state_of(stage: StageRun) -> State:
    """What the run directory says."""
    if (stage.run_dir / WEIGHTS).is_file():
        return State.FINISHED
    return State.INTERRUPTED if (stage.run_dir / STARTED).is_file() else State.NEW


def run_here(runs: Sequence[Run], *, ranks: str, say: Callable[[str], None]) -> Outcome:
    """Runs what is not finished, one training after another, through `python -m launch`; what was interrupted goes on.

    A training that fails ends its run, not the sweep. SIGTERM, SIGINT and SIGUSR1 reach the training, which saves; that ends the
    sweep.
    """
    failed = []
    for number, run in enumerate(runs, start=1):
        for stage in run.stages:
            state = state_of(stage)
            say(f"[{number}/{len(runs)}] {run.label} · {stage.stage}: {state.value if state is not State.NEW else 'starting'}")
            if state is State.FINISHED:
                continue
            code = _train(stage, ranks)
            if code == PREEMPTED:
                return Outcome(tuple(failed), preempted=True)
            if code:
                failed.append((run, stage, code))
                break
    return Outcome(tuple(failed), preempted=False)


def launch_command(stage: StageRun, *, ranks: str) -> list[str]:
    """The command line that trains a stage on this node."""
    return ["python", "-m", "launch", "--ranks", ranks, "--", *stage.arguments]


def slurm_script(runs: Sequence[Run], *, name: str, ranks: str, nodes: int, at_once: int) -> str:
    """A Slurm array with a task per run: it goes through the stages, skips what is finished, queues again when preempted."""
    lines = "\n".join(f"        {number}) run={shlex.quote(run.name)} ;;" for number, run in enumerate(runs))
    return f"""#!/bin/bash
# {len(runs)} runs of the sweep {name}, written by simmim sweep. Adapt the resources, then: sbatch FILE
# The same file again goes on where it was: finished trainings are skipped, interrupted ones resumed.
#SBATCH --job-name={name}
#SBATCH --array=0-{len(runs) - 1}%{at_once}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%A_%a.log
set -u
case $SLURM_ARRAY_TASK_ID in
{lines.replace("        ", "    ")}
esac
preempted() {{ kill -USR1 "$child"; wait "$child"; code=$?; }}
{_train_function(runs, "--launcher slurm" if nodes > 1 else f"--ranks {ranks}")}
code=0
trap preempted USR1
stages "$run" & child=$!
wait "$child" || code=$?
if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; fi
exit "$code"
"""


def hostfile_script(runs: Sequence[Run], *, name: str, hostfile: str) -> str:
    """A shell script that carries the runs out one after another, each on all nodes of a hostfile."""
    todo = "\n".join(f"stages {shlex.quote(run.name)} || {{ code=$?; [ $code -eq {PREEMPTED} ] && exit $code; }}" for run in runs)
    return f"""#!/bin/bash
# {len(runs)} runs of the sweep {name} on the nodes of {hostfile}, written by simmim sweep.
# The same file again goes on where it was: finished trainings are skipped, interrupted ones resumed.
set -u
code=0
{_train_function(runs, f"--hostfile {shlex.quote(hostfile)}")}
{todo}
exit "$code"
"""


def _train_function(runs: Sequence[Run], where: str) -> str:
    """A shell function `stages NAME` with the trainings of every run."""
    cases = []
    for run in runs:
        parts = []
        for stage in run.stages:
            command = f"python -m launch {where} -- {shlex.join(stage.arguments)}"
            parts.append(f"        [ -f {shlex.quote(str(stage.run_dir / WEIGHTS))} ] || {command} || return $?")
        cases.append(f"    {shlex.quote(run.name)})\n" + "\n".join(parts) + " ;;")
    return "stages() {\n    case $1 in\n" + "\n".join(cases) + "\n    esac\n}"


def _train(stage: StageRun, ranks: str) -> int:
    command = [sys.executable, *launch_command(stage, ranks=ranks)[1:]]
    with subprocess.Popen(command) as process, _passing_on(process):
        return process.wait()


@contextmanager
def _passing_on(process: subprocess.Popen) -> Iterator[None]:
    """Signals of this process reach the training instead."""
    previous = {number: signal.signal(number, lambda received, _: process.send_signal(received)) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
