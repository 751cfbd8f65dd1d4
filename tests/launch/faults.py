"""Faults that tests inject into a launch over two hosts, and how each of them must end."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launch.rig import Rig

SAVED, FAILED, HUNG = 75, 137, 76


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: for the reader.
        inject: does it to the launch with this mark.
        code: the exit code that `python -m launch` must end with; None where it is killed itself.
        saves: whether the run must have been saved on the way out.
    """

    name: str
    inject: Callable[[Rig, str], None]
    code: int | None
    saves: bool


def find(rig: Rig, mark: str, host: str, *words: str, without: str = "\0") -> psutil.Process:
    """The process on a host with these words on its command line: of several, the one above the others."""
    found = []
    for process in rig.on(host, rig.family(mark)):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if all(any(word in part for part in line) for word in words) and not any(without in part for part in line):
            found.append(process)
    ids = {process.pid for process in found}
    return next(process for process in found if process.ppid() not in ids)


def rank(rig: Rig, mark: str, host: str = "b") -> psutil.Process:
    """The rank on a host: the child of its keeper."""
    keepers = [process for process in rig.on(host, rig.family(mark)) if "launch.rank" in process.cmdline()]
    children = [child for keeper in keepers for child in keeper.children() if "launch.rank" not in child.cmdline()]
    (found,) = children
    return found


def node(rig: Rig, mark: str, host: str = "b") -> psutil.Process:
    return find(rig, mark, host, "launch.node", without="cd /")


def launcher(rig: Rig, mark: str, host: str = "b") -> psutil.Process:
    return find(rig, mark, host, "deepspeed.launcher.launch")


def head(rig: Rig, mark: str) -> psutil.Process:
    return find(rig, mark, "a", "--hostfile")


def kill_everything(rig: Rig, mark: str) -> None:
    for process in rig.family(mark):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def send(number: int, who: Callable[[Rig, str], psutil.Process]) -> Callable[[Rig, str], None]:
    return lambda rig, mark: os.kill(who(rig, mark).pid, number)


def pull_cable(rig: Rig, mark: str) -> None:
    rig.pull_cable()


FAULTS = (
    Fault("a worker is killed", send(signal.SIGKILL, rank), FAILED, saves=False),
    Fault("a node's launcher is killed", send(signal.SIGKILL, launcher), SAVED, saves=True),
    Fault("a node's supervisor is killed", send(signal.SIGKILL, node), HUNG, saves=True),
    Fault("the head is killed", send(signal.SIGKILL, head), None, saves=True),
    Fault("a worker is stopped", send(signal.SIGSTOP, rank), HUNG, saves=False),
    Fault("the cable is pulled", pull_cable, HUNG, saves=False),
    Fault("SIGTERM to the head", send(signal.SIGTERM, head), SAVED, saves=True),
    Fault("SIGINT to the head", send(signal.SIGINT, head), SAVED, saves=True),
    Fault("SIGTERM to a node's supervisor", send(signal.SIGTERM, node), SAVED, saves=True),
    Fault("SIGTERM to a node's launcher", send(signal.SIGTERM, launcher), SAVED, saves=True),
    Fault("SIGUSR1 to a worker", send(signal.SIGUSR1, rank), SAVED, saves=True),
)


def read_reports(log_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(log_dir.glob("stall-report-*")))
