"""Every fault on a launch over two hosts: it ends in time, with its exit code, and leaves no process anywhere.

The ranks are small programs here, so that a fault costs seconds; `make test-faults` does the same to real training.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.faults import FAULTS, Fault, kill_everything, node, read_reports
from tests.launch.rig import Rig, until

PROGRAM = Path(__file__).parent / "programs" / "rank_program.py"
ENTRY = "import sys; from launch.cli import main; sys.exit(main(sys.argv[2:], program=[sys.argv[1]]))"
LIMITS = ("--heartbeat-seconds", "6", "--node-seconds", "6", "--grace", "20")
ENDS_WITHIN = 90.0  # seconds: silence, report and patience with peers are 6, 8 and 30; the rest is for a busy machine


class Start:
    """One launch over both hosts."""

    def __init__(self, rig: Rig, folder: Path, mode: str, *options: str, mark: str = "faults"):
        self.rig, self.mark = rig, mark
        self.out, self.logs = folder / "out", folder / "logs"
        self.out.mkdir(exist_ok=True)
        (folder / "hosts").write_text("a slots=1\nb slots=1\n")
        own = ["--hostfile", str(folder / "hosts"), "--log-dir", str(self.logs), *LIMITS, *options]
        command = [sys.executable, "-c", ENTRY, str(PROGRAM), *own, "--", str(self.out), mode]
        self.process = rig.start(command, mark=mark, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_ready(self) -> None:
        files = [self.out / f"ready_{rank}.json" for rank in (0, 1)]
        until(lambda: all(file.exists() for file in files) or self.process.poll() is not None, "both ranks")
        assert self.process.poll() is None, self.process.communicate()

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=ENDS_WITHIN)
        return self.process.returncode, stdout, stderr

    def saved(self) -> list[bool]:
        return [(self.out / f"saved_{rank}.json").exists() for rank in (0, 1)]


@pytest.fixture
def start(rig, tmp_path):
    started = []

    def begin(mode: str, *options: str) -> Start:
        started.append(Start(rig, tmp_path, mode, *options))
        return started[-1]

    yield begin
    rig.plug_cable()
    kill_everything(rig, "faults")
    for one in started:
        one.process.communicate()


# The others differ from these in who is hit, not in who acts: `make test-faults` has them all.
QUICK = (
    "a worker is killed",
    "a node's supervisor is killed",
    "the head is killed",
    "the cable is pulled",
    "a worker is stopped",
)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, id=fault.name, marks=() if fault.name in QUICK else pytest.mark.faults) for fault in FAULTS],
)
def test_a_fault_ends_the_launch_in_time_and_leaves_nothing(start, rig, fault: Fault):
    one = start("beat", "--launcher", "ssh")
    one.wait_ready()
    fault.inject(rig, one.mark)
    began = time.monotonic()
    code, _, stderr = one.end()
    until(lambda: not rig.family(one.mark), "the last process", seconds=ENDS_WITHIN)
    assert time.monotonic() - began < ENDS_WITHIN
    assert code == (fault.code if fault.code is not None else -9), stderr
    if fault.saves:
        assert one.saved() == [True, True], stderr
    if fault.name == "a worker is stopped":
        report = read_reports(one.logs)
        assert "SUSPECT rank 1 on b" in report
        assert "in beat" in report.partition("----- rank 1")[2].partition("-----")[0], report  # asleep: a signal woke it
        assert "SUSPECT rank 1 on b" in stderr
    if fault.name == "the cable is pulled":
        assert "lost node b (10.99.0.2), ranks 1 to 1" in stderr
        assert "LOST node b" in read_reports(one.logs)


def test_a_run_outlives_the_ssh_that_started_it(start, rig):
    one = start("beat", "--launcher", "pdsh")
    one.wait_ready()
    assert not list(one.logs.glob(".order-*"))
    gone = [process for process in rig.family(one.mark) if process.name().startswith(("ssh", "pdsh"))]
    assert len(gone) >= 3
    for process in gone:
        process.kill()
    time.sleep(8)  # longer than any silence that is allowed
    assert one.process.poll() is None
    node(rig, one.mark).send_signal(signal.SIGTERM)
    code, _, stderr = one.end()
    assert code == 75, stderr
    assert one.saved() == [True, True]
    until(lambda: not rig.family(one.mark), "the last process", seconds=ENDS_WITHIN)


def test_a_hung_collective_ends_the_launch_and_names_who_is_behind(start, rig):
    code, _, stderr = (one := start("hang", "--launcher", "pdsh", "--stall-seconds", "4")).end()
    assert code == 76, stderr
    assert "SUSPECT rank 1 on b" in stderr
    report = read_reports(one.logs)
    assert "it is behind the others" in report
    assert "in waits_for_data" in report.partition("----- rank 1")[2].partition("-----")[0], report
    assert "in wait_for_all" in report.partition("----- rank 0")[2].partition("-----")[0], report
    until(lambda: not rig.family(one.mark), "the last process", seconds=ENDS_WITHIN)
    assert not list(one.logs.glob(".order-*"))


def test_torchrun_starts_the_ranks_as_well_and_output_comes_through(start, rig):
    code, stdout, stderr = (one := start("finish", "--launcher", "torchrun", "--export", "SIMMIM_OWN=7")).end()
    assert code == 0, stderr
    assert "a long line " * 2000 in stdout
    seen = json.loads((one.out / "seen_1.json").read_text())
    assert seen["environment"]["WORLD_SIZE"] == "2"
    assert seen["environment"]["MASTER_ADDR"] == "10.99.0.1"
    assert seen["own"] == "7"
    assert not rig.family(one.mark)
