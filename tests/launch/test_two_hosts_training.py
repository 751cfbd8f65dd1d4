"""ZeRO-3 over two hosts by hostfile: the losses of the run on one machine, through a killed worker and a restart too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launch.rig import Rig, until

STEPS, SAVE_EVERY = 8, 2
CONFIG = "configs/debug/tiny_swinv2.yaml"


def settings(shards: Path, run_dir: Path) -> list[str]:
    return [
        *(f"data.train={shards}", "data.validation=null", f"run_dir={run_dir}", "engine.zero_stage=3", "engine.precision=fp32"),
        *(f"train.steps={STEPS}", "train.global_batch=8", "train.micro_batch=2", f"checkpoint.every_steps={SAVE_EVERY}"),
    ]


def launch(rig: Rig, shards: Path, run_dir: Path, *options: str, mark: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch", *options, "--", "pretrain", CONFIG, *settings(shards, run_dir)]
    return rig.start(command, mark=mark, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run_dir: Path) -> list[float]:
    """Step, loss, gradient norm and learning rate of every step, one after another."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("step", "loss", "grad_norm", "lr")]


def rank_on(rig: Rig, host: str, mark: str) -> psutil.Process:
    """The process that trains on a host: the one of `simmim_scale` that is nobody's data worker."""
    found = [
        one for one in rig.on(host, rig.family(mark)) if "simmim_scale" in (line := one.cmdline()) and "launch.rank" not in line
    ]
    return next(one for one in found if one.ppid() not in {other.pid for other in found})


def test_two_hosts_give_the_losses_of_one_machine_even_after_a_kill(rig, shards, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    here = launch(rig, shards, alone, "--ranks", "1", mark="alone")
    output, _ = here.communicate(timeout=600)
    assert here.returncode == 0, output

    options = ("--hostfile", str(tmp_path / "hosts"), "--launcher", "ssh", "--max-restarts", "1")
    process = launch(rig, shards, together, *options, mark="together")
    until(lambda: list(together.glob("checkpoints/step_*/manifest.json")) or process.poll() is not None, "a save")
    os.kill(rank_on(rig, "b", "together").pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "rank 1 failed: signal SIGKILL" in output
    assert "restart 1 of 1" in output
    assert losses(alone)[-4] == STEPS
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert not rig.family("together")
