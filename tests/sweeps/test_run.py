"""Carrying a sweep out: skipping, resuming, failures and signals, with a stand-in for the training; and the job lists."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from simmim_scale.sweeps import run as carrying_out
from simmim_scale.sweeps.expand import expand
from simmim_scale.sweeps.run import hostfile_script, run_here, slurm_script
from simmim_scale.sweeps.spec import load_sweep

# Stands in for the launcher: finishes, fails or waits for a signal as the run directory's name says, and keeps a diary.
STAND_IN = """
import pathlib, signal, sys, time
run_dir = pathlib.Path(next(word for word in sys.argv if word.startswith("run_dir=")).removeprefix("run_dir="))
diary = run_dir.parents[1] / "diary"
diary.parent.mkdir(parents=True, exist_ok=True)
with diary.open("a") as file:
    file.write(run_dir.parent.name + "\\n")
run_dir.mkdir(parents=True, exist_ok=True)
(run_dir / "config.yaml").write_text("x")
if (run_dir.parents[1] / ("fail-" + run_dir.parent.name)).exists():
    sys.exit(3)
if (run_dir.parents[1] / ("wait-" + run_dir.parent.name)).exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (run_dir.parents[1] / "waiting").write_text("x")
    time.sleep(60)
(run_dir / "weights").mkdir(exist_ok=True)
(run_dir / "weights" / "model.safetensors").write_bytes(b"x")
"""


@pytest.fixture
def runs(write_sweep, sweep_tree, tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(
        carrying_out, "launch_command", lambda stage, **_: ["python", str(tmp_path / "stand_in.py"), *stage.arguments]
    )
    path = write_sweep(sweep_tree)
    return expand(load_sweep(path), path)


@pytest.fixture
def folder(runs):
    found = runs[0].stages[0].run_dir.parents[1]
    found.mkdir(parents=True, exist_ok=True)
    return found


def diary(folder):
    return (folder / "diary").read_text().split()


def test_finished_runs_are_skipped_and_the_rest_carried_out(runs, folder):
    said = []
    assert run_here(runs[1:3], ranks="1", say=said.append).failed == ()
    assert run_here(runs, ranks="1", say=said.append) == carrying_out.Outcome((), preempted=False)
    assert diary(folder) == ["8-px_5", "16-px_3", "8-px_3", "16-px_5"]
    assert any("8 px, .5 · pretrain: finished" in text for text in said)


def test_a_failure_ends_its_run_and_not_the_sweep(runs, folder):
    (folder / "fail-8-px_5").touch()
    second = [replace(run, stages=(*run.stages, replace(run.stages[0], stage="again"))) for run in runs]
    outcome = run_here(second, ranks="1", say=lambda _: None)
    assert [(run.name, stage.stage, code) for run, stage, code in outcome.failed] == [("8-px_5", "pretrain", 3)]
    assert diary(folder) == ["8-px_3", "8-px_5", "16-px_3", "16-px_5"], "the second stage is the same directory: finished"
    (folder / "fail-8-px_5").unlink()
    assert run_here(second, ranks="1", say=lambda _: None).failed == ()


def test_a_signal_reaches_the_training_and_ends_the_sweep(runs, folder):
    (folder / "wait-8-px_5").touch()
    before = signal.getsignal(signal.SIGTERM)

    def stop():
        while not (folder / "waiting").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    outcome = run_here(runs, ranks="1", say=lambda _: None)
    thread.join()
    assert outcome.preempted
    assert diary(folder) == ["8-px_3", "8-px_5"]
    assert signal.getsignal(signal.SIGTERM) is before
    (folder / "wait-8-px_5").unlink()
    assert not run_here(runs, ranks="1", say=lambda _: None).preempted


def run_script(text, tmp_path, **environment):
    """A job list with a stand-in for python; what it was called with, and the exit code."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    fake = tmp_path / "bin" / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {sys.executable} {tmp_path}/stand_in.py "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "job.sh").write_text(text)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    result = subprocess.run(["bash", tmp_path / "job.sh"], env={**os.environ, "PATH": path, **environment}, check=False)
    return (tmp_path / "calls").read_text().splitlines(), result.returncode


def test_the_slurm_array_runs_the_task_of_its_index(runs, folder, tmp_path):
    text = slurm_script(runs, name="tried", ranks="8", nodes=1, at_once=2)
    assert "--array=0-3%2" in text
    calls, code = run_script(text, tmp_path, SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_JOB_ID="7")
    assert code == 0
    assert diary(folder) == ["16-px_3"]
    assert calls[0].startswith("-m launch --ranks 8 -- pretrain")
    assert '"$code" -eq 75 ]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in text
    assert "--launcher slurm" in slurm_script(runs, name="tried", ranks="8", nodes=4, at_once=2)
    shellcheck(text, tmp_path)


def test_the_job_list_of_a_hostfile_goes_on_after_a_failure_and_skips_what_is_finished(runs, folder, tmp_path):
    (folder / "fail-8-px_5").touch()
    text = hostfile_script(runs, name="tried", hostfile="my hosts")
    calls, code = run_script(text, tmp_path)
    assert code == 3
    assert diary(folder) == [run.name for run in runs]
    assert calls[0].startswith("-m launch --hostfile my hosts -- pretrain")
    (folder / "fail-8-px_5").unlink()
    calls, code = run_script(text, tmp_path)
    assert code == 0
    assert diary(folder)[4:] == ["8-px_5"]
    shellcheck(text, tmp_path)


def shellcheck(text, tmp_path):
    (tmp_path / "check.sh").write_text(text)
    linter = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    result = subprocess.run([linter, "-S", "warning", tmp_path / "check.sh"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
