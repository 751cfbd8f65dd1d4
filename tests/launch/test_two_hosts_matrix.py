"""Real training over two hosts, broken in every way, again and again: nothing is lost but the steps since the last save.

One run directory goes through all faults, each start resuming from what the one before left. Its losses must be those of a run
that nobody disturbed. `make test-faults` runs it; SIMMIM_FAULT_MINUTES sets the length of the random part (3), SIMMIM_FAULT_SEED
chooses its faults.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simmim_scale.engine.checkpoint import complete_saves
from tests.launch.faults import FAULTS, Fault, head, kill_everything, rank, read_reports
from tests.launch.rig import PATIENCE, Rig, until
from tests.launch.test_two_hosts_training import CONFIG

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SAVE_EVERY = 5
LIMITS = ("--heartbeat-seconds", "10", "--node-seconds", "10", "--stall-seconds", "120", "--grace", "60")
ENDS_WITHIN = 150.0  # seconds: the longest limit above, twice the patience with peers (15), the rest for a busy machine
MARK = "matrix"


class Training:
    """One run directory, started again and again."""

    def __init__(self, rig: Rig, shards: Path, folder: Path, *, steps: int):
        self.rig, self.shards, self.folder, self.steps = rig, shards, folder, steps
        self.run_dir = folder / "run"
        (folder / "hosts").write_text("a slots=1\nb slots=1\n")
        self.process: subprocess.Popen | None = None
        self.log = folder / "output.log"

    def command(self, *options: str) -> list[str]:
        settings = [
            *(f"data.train={self.shards}", "data.validation=null", f"run_dir={self.run_dir}", "model.embed_dim=8"),
            *(f"train.steps={self.steps}", "train.global_batch=4", "train.micro_batch=2", f"checkpoint.every_steps={SAVE_EVERY}"),
        ]
        return [sys.executable, "-m", "launch", *options, "--", "pretrain", CONFIG, *settings]

    def begin(self) -> None:
        options = ("--hostfile", str(self.folder / "hosts"), "--launcher", "ssh", *LIMITS)
        with self.log.open("ab") as log:
            self.process = self.rig.start(self.command(*options), mark=MARK, stdout=log, stderr=log)

    def recorded(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def saved(self) -> int:
        return max((save.step for save in complete_saves(self.run_dir / "checkpoints")), default=0)

    def wait_for_step(self, step: int) -> None:
        """Until this start has recorded the step; what an earlier one recorded is cut off when it resumes."""
        until(lambda: self._resumed() or self.process.poll() is not None, "the first step of this start")
        until(lambda: self.recorded() >= step or self.process.poll() is not None, f"step {step}")
        assert self.process.poll() is None, self.output()

    def _resumed(self) -> bool:
        path = self.run_dir / "metrics.jsonl"
        return path.exists() and path.stat().st_mtime > self.began

    def wait(self, seconds: float) -> int:
        code = self.process.wait(seconds)
        until(lambda: not self.rig.family(MARK), "the last process", seconds=ENDS_WITHIN)
        return code

    def output(self) -> str:
        return self.log.read_text()[-8000:]

    def suffer(self, fault: Fault) -> float:
        """Starts, trains a little, breaks it, and checks its end; returns the seconds from the fault to the last process."""
        before = self.saved()
        self.began = time.time()
        self.begin()
        self.wait_for_step(before + 2)
        fault.inject(self.rig, MARK)
        broken = time.monotonic()
        code = self.wait(ENDS_WITHIN)
        seconds = time.monotonic() - broken
        self.rig.plug_cable()
        assert code == (fault.code if fault.code is not None else -signal.SIGKILL), f"{fault.name}: {code}\n{self.output()}"
        recorded, saved = self.recorded(), self.saved()
        lost = recorded - saved
        assert lost == 0 if fault.saves else lost <= SAVE_EVERY, f"{fault.name}: saved {saved} of {recorded}\n{self.output()}"
        assert saved >= before
        if fault.inject is kill_during_a_save:
            assert list((self.run_dir / "checkpoints").glob(".unfinished-*")), "the kill came too late for the save"
        sys.stdout.write(f"{fault.name}: exit code {code} after {seconds:.1f} s; {recorded} steps, {saved} saved\n")
        return seconds

    def finish(self) -> None:
        self.begin()
        assert self.wait(600) == 0, self.output()

    def losses(self) -> list[float]:
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [row[key] for row in rows for key in ("step", "loss", "grad_norm", "lr")]


@pytest.fixture
def training(rig, shards, tmp_path) -> Iterator[Callable[..., Training]]:
    folder = rig.disk / tmp_path.name
    folder.mkdir()
    yield lambda steps: Training(rig, shards, folder, steps=steps)
    rig.plug_cable()
    kill_everything(rig, MARK)
    until(lambda: not rig.family(MARK), "the last process")
    shutil.rmtree(folder)


@pytest.fixture
def undisturbed(rig, shards, tmp_path) -> Callable[[int], list[float]]:
    def losses(steps: int) -> list[float]:
        folder = tmp_path / "alone"
        folder.mkdir()
        alone = Training(rig, shards, folder, steps=steps)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = rig.start(alone.command("--ranks", "2"), mark="alone", text=True, **streams)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        return alone.losses()

    return losses


def during_a_save(rig: Rig, mark: str) -> None:
    """Waits until a save has begun, not until an older one is removed, and looks often: a small model is saved within a blink."""
    checkpoints = run_dir_of(rig, mark) / "checkpoints"
    newest = max((save.step for save in complete_saves(checkpoints)), default=0)
    left = {path.stat().st_ino for path in checkpoints.glob(".unfinished-*")}  # by an earlier kill; the next save removes it
    end = time.monotonic() + PATIENCE
    while not any(_begun(path, newest, left) for path in checkpoints.glob(".unfinished-step_*")):
        assert time.monotonic() < end, "no save begins"
        time.sleep(0.001)


def _begun(path: Path, newest: int, left: set[int]) -> bool:
    return int(path.name.rpartition("_")[2]) > newest and path.exists() and path.stat().st_ino not in left


def run_dir_of(rig: Rig, mark: str) -> Path:
    return Path(next(word for word in head(rig, mark).cmdline() if word.startswith("run_dir=")).partition("=")[2])


def kill_during_a_save(rig: Rig, mark: str) -> None:
    everybody = rig.family(mark)  # looked up first, since that takes longer than a save
    during_a_save(rig, mark)
    for process in sorted(everybody, key=lambda process: "simmim_scale" not in process.cmdline()):
        process.kill()
    kill_everything(rig, mark)


def stop_during_a_save(rig: Rig, mark: str) -> None:
    process = rank(rig, mark)
    during_a_save(rig, mark)
    process.suspend()


def fill_the_disk(rig: Rig, mark: str) -> None:
    """Leaves too little for a save, waits for one to fail, and makes room again."""
    run_dir = run_dir_of(rig, mark)
    filler = run_dir.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):  # full: the run writes meanwhile, so how much fits is found by trying
            while file.write(b"\0" * (1 << 20)):
                continue
        file.truncate(max(0, file.tell() - 200_000))
    process = head(rig, mark)
    until(lambda: not process.is_running() or process.status() == "zombie", "the end of a run without space", seconds=ENDS_WITHIN)
    filler.unlink()


DURING_SAVES = (
    Fault("everything is killed during a save", kill_during_a_save, None, saves=False),
    Fault("the disk is full", fill_the_disk, 1, saves=False),
)


def test_every_fault_and_the_losses_of_an_undisturbed_run(training, undisturbed):
    faults = [*FAULTS, *DURING_SAVES]
    run = training(steps := 5 * len(faults))
    for fault in faults:
        run.suffer(fault)
    reports = read_reports(run.run_dir / "logs")
    assert re.search(r"SUSPECT rank 1 on b .*T \(stopped\)", reports)
    assert "LOST node b" in reports
    run.finish()
    assert run.losses() == pytest.approx(undisturbed(steps), rel=1e-6)


def test_random_faults_for_some_minutes(training, undisturbed):
    minutes = float(os.environ.get("SIMMIM_FAULT_MINUTES", "3"))
    seed = int(os.environ.get("SIMMIM_FAULT_SEED", str(random.randrange(10**6))))
    sys.stdout.write(f"SIMMIM_FAULT_SEED={seed}\n")
    dice = random.Random(seed)
    end, count = time.monotonic() + 60 * minutes, 0
    run = training(steps := int(40 * minutes) + 40)
    # a worker stopped while it saves: the save must not count, and the job must not wait for it
    faults = [*FAULTS, *DURING_SAVES, Fault("a worker is stopped during a save", stop_during_a_save, 76, saves=False)]
    while time.monotonic() < end and run.saved() + 10 < steps:
        run.suffer(dice.choice(faults))
        count += 1
    sys.stdout.write(f"{count} faults in {minutes:g} minutes\n")
    run.finish()
    assert count >= 1
    assert run.losses() == pytest.approx(undisturbed(steps), rel=1e-6)
