"""The whole launcher with DeepSpeed's real one: output, signals, exit codes, and everybody killed once."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PROGRAM = Path(__file__).parent / "programs" / "rank_program.py"
ENTRY = "import sys; from launch.cli import main; sys.exit(main(sys.argv[2:], program=[sys.argv[1]]))"
MARK = "SIMMIM_LAUNCH_TEST"  # an environment variable that every descendant inherits, adopted or not
BUSY_MACHINE = 300.0  # seconds that a start may take while others use both cores


def until(condition: Callable[[], object], *, seconds: float = BUSY_MACHINE) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@dataclass
class Start:
    """One `python -m launch` and what it leaves in `out` and `logs`."""

    process: subprocess.Popen
    mark: str
    out: Path
    logs: Path

    def family(self) -> list[psutil.Process]:
        """Every living process of this start, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def read(self, name: str, rank: int) -> dict:
        return json.loads((self.out / f"{name}_{rank}.json").read_text())

    def wait_ready(self) -> None:
        files = [self.out / f"ready_{rank}.json" for rank in (0, 1)]
        assert until(lambda: all(file.exists() for file in files) or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()

    def pid_of(self, who: str) -> int:
        rank = psutil.Process(self.read("ready", 1)["pid"])
        launcher = next(found for found in self.family() if found.cmdline()[2:4] == ["-m", "deepspeed.launcher.launch"])
        fronts = [child.pid for child in launcher.children()]
        return {
            "supervisor": self.process.pid,
            "launcher": launcher.pid,
            "front": fronts[0],
            "keeper": rank.ppid(),
            "rank": rank.pid,
        }[who]

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=BUSY_MACHINE)
        return self.process.returncode, stdout, stderr


class Starter:
    def __init__(self, folder: Path):
        self.folder = folder
        self.starts: list[Start] = []

    def __call__(self, mode: str, *arguments: str, options: tuple[str, ...] = (), **streams) -> Start:
        out, logs, mark = self.folder / "out", self.folder / "logs", uuid.uuid4().hex
        out.mkdir()
        own = ["--ranks", "2", "--log-dir", str(logs), *options]
        command = [sys.executable, "-c", ENTRY, str(PROGRAM), *own, "--", str(out), mode, *arguments]
        streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, MARK: mark, "TMPDIR": str(self.folder)}
        environment.pop("OMP_NUM_THREADS", None)
        process = subprocess.Popen(command, env=environment, text=True, **streams)
        self.starts.append(Start(process=process, mark=mark, out=out, logs=logs))
        return self.starts[-1]


@pytest.fixture
def start(tmp_path_factory) -> Iterator[Starter]:
    # a short path: the socket of the launcher is made below it
    starter = Starter(tmp_path_factory.mktemp("l"))
    yield starter
    for one in starter.starts:
        for process in one.family():
            process.kill()
        one.process.wait()


def assert_nothing_left(one: Start, *, seconds: float = 60.0) -> None:
    assert until(lambda: not one.family(), seconds=seconds), [process.cmdline() for process in one.family()]
    left = [path for path in one.out.parent.iterdir() if path not in (one.out, one.logs)]
    assert not left, f"temporary files: {left}"


def test_a_run_that_finishes(start):
    one = start("finish", "key=a value", "--flag", "-m")
    code, stdout, stderr = one.end()
    assert code == 0
    assert "rank 0 began" in stdout
    assert "rank 1 began" not in stdout + stderr
    assert "a long line " * 2000 in stdout
    for rank in (0, 1):
        log = (one.logs / f"rank_{rank:05d}.log").read_text()
        assert log.startswith("===== ")
        assert f"rank {rank} began" in log
        assert log.count("a long line") == 2000
        seen = one.read("seen", rank)
        assert seen["arguments"] == ["key=a value", "--flag", "-m"]
        assert seen["environment"]["RANK"] == seen["environment"]["LOCAL_RANK"] == str(rank)
        assert seen["environment"]["WORLD_SIZE"] == "2"
        assert int(seen["environment"]["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
        assert str(Path(sys.executable).parent) in seen["environment"]["PATH"].split(":")
        assert seen["terminals"] == [False, False]
    assert_nothing_left(one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once_and_no_worker(start, number):
    one = start("wait")
    one.wait_ready()
    one.process.send_signal(number)
    code, stdout, stderr = one.end()
    assert code == 75, stderr
    for rank in (0, 1):
        assert one.read("saved", rank) == {"signals": [number], "worker_alive": True}
    assert "rank 0: saved" in stdout
    assert f"launch: {number.name} passed on to 2 ranks" in stderr
    assert "goes on from there" in stderr
    assert_nothing_left(one)


def test_a_stop_before_any_rank_began_loses_nothing(start):
    one = start("wait")
    assert until(lambda: (one.logs / "launcher.log").exists())  # ranks come seconds later: DeepSpeed is imported first
    one.process.send_signal(signal.SIGTERM)
    code, _, stderr = one.end()
    assert code == 75, stderr
    assert "before any rank began" in stderr
    assert not list(one.out.iterdir())
    assert_nothing_left(one)


def test_sigterm_to_the_deepspeed_launcher_alone_is_a_request_to_all(start):
    one = start("wait")
    one.wait_ready()
    os.kill(one.pid_of("launcher"), signal.SIGTERM)
    code, _, stderr = one.end()
    assert code == 75, stderr
    for rank in (0, 1):
        assert one.read("saved", rank) == {"signals": [signal.SIGTERM], "worker_alive": True}
    assert_nothing_left(one)


@pytest.mark.parametrize(
    ("who", "code", "saves"),
    [("supervisor", -9, True), ("launcher", 75, True), ("front", 75, True), ("keeper", 137, False), ("rank", 137, False)],
)
def test_whoever_is_killed_nothing_is_left(start, who, code, saves):
    one = start("wait")
    one.wait_ready()
    os.kill(one.pid_of(who), signal.SIGKILL)
    # The supervisor's output is open in its keepers until they end, so its end is waited for, not the end of its output.
    assert one.process.wait(BUSY_MACHINE) == code
    assert until(lambda: not one.family(), seconds=20), [process.cmdline() for process in one.family()]
    assert [(one.out / f"saved_{rank}.json").exists() for rank in (0, 1)] == [saves, saves]
    _, stderr = one.process.communicate()
    if not saves:
        assert "rank 1 failed: signal SIGKILL" in stderr
    assert_nothing_left(one)


def test_the_output_of_a_failed_rank_is_shown(start):
    code, stdout, stderr = (one := start("fail")).end()
    assert code == 3
    assert "rank 0: about to fail" in stdout
    assert "launch: rank 1 failed: exit code 3" in stderr
    assert "  | rank 1: about to fail" in stderr
    assert_nothing_left(one)


def test_a_user_error_of_all_ranks_is_printed_once(start):
    code, stdout, stderr = (one := start("user-error")).end()
    assert code == 2
    assert (stdout + stderr).count("error: no shards here") == 1
    assert "Traceback" not in stdout + stderr
    assert_nothing_left(one)


def test_a_rank_that_does_not_stop_is_killed_after_its_grace(start):
    one = start("deaf", options=("--grace", "2"))
    one.wait_ready()
    asked = time.monotonic()
    one.process.send_signal(signal.SIGTERM)
    code, _, stderr = one.end()
    assert code == 137
    assert time.monotonic() - asked > 2
    assert "before a complete save" in stderr
    assert "--grace" in stderr
    assert_nothing_left(one)


def test_a_hung_rank_ends_the_run_with_a_report(start):
    one = start("hang", options=("--stall-seconds", "3"))
    code, _, stderr = one.end()
    assert code == 76, stderr
    assert "SUSPECT rank 1 on this node" in stderr
    (report,) = one.logs.glob("stall-report-*.txt")
    assert "in waits_for_data" in report.read_text()
    assert str(report) in stderr
    assert_nothing_left(one)


def test_a_second_interrupt_ends_at_once(start):
    one = start("deaf")
    one.wait_ready()
    one.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    one.process.send_signal(signal.SIGINT)
    assert one.end()[0] == 137
    assert_nothing_left(one)


def test_a_closed_output_does_not_end_the_run(start):
    reader, writer = os.pipe()
    os.close(reader)
    one = start("finish", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    code, _, _ = one.end()
    assert code == 0
    assert (one.logs / "rank_00000.log").read_text().count("a long line") == 2000


def test_on_a_terminal_rank_0_has_one_and_the_log_has_none_of_its_codes(start):
    outer, inner = pty.openpty()
    one = start("bar", stdout=inner, stderr=inner)
    os.close(inner)
    shown = bytearray()
    reader = threading.Thread(target=collect, args=(outer, shown))
    reader.start()
    assert one.process.wait(BUSY_MACHINE) == 0
    reader.join(10)
    os.close(outer)
    assert one.read("seen", 0)["terminals"] == [True, True]
    assert one.read("seen", 1)["terminals"] == [False, False]
    assert b"\x1b[32mstep 40 %" in shown
    log = (one.logs / "rank_00000.log").read_text()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    assert re.fullmatch(rf"===== .*\n{stamp}rank 0 began\n{stamp}step 100 %\n{stamp}done\n", log), log


def collect(descriptor: int, into: bytearray) -> None:
    try:
        while data := os.read(descriptor, 4096):
            into += data
    except OSError:
        return  # how a pseudo-terminal says that nobody has it open any more
