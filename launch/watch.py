"""The watchdog of a node's ranks: who stopped, who makes no progress, and where each of them is.

A rank that reports itself (`simmim_scale.engine.heartbeat`) writes one line into a file of this node: `seconds marks step phase`,
once a second and at every mark. A stopped process writes nothing; a hung one writes, but its marks stand still.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

VARIABLE = "SIMMIM_HEARTBEAT"  # where a rank finds the name of its file
STACKS = ".stacks"  # beside it: where it writes its stacks when it gets DUMP
DUMP = signal.SIGUSR2
DUMP_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds after which a rank counts as hung.

    Args:
        heartbeat: without a heartbeat: the process is stopped or starved.
        stall: without progress, once it has done a step: a collective hangs, or data does not come.
        start: without progress before that: compiling and reading a large model take long.
    """

    heartbeat: float = 60.0
    stall: float = 600.0
    start: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The last words of a rank: when, how many marks it has passed, and what it does. Times are those of the monotonic clock."""

    at: float
    marks: int
    marked_at: float
    step: int
    phase: str

    @classmethod
    def read(cls, path: str) -> Self | None:
        try:
            at, marks, marked_at, step, phase = Path(path).read_text().split()
            return cls(at=float(at), marks=int(marks), marked_at=float(marked_at), step=int(step), phase=phase)
        except (OSError, ValueError):
            return None  # not there yet


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Where a rank is, for a person and for the head."""

    rank: int
    node: str
    pid: int
    state: str
    silent: float | None  # seconds since its last heartbeat; None if it never gave one
    marks: int
    standing: float | None  # seconds since its last mark
    step: int
    phase: str
    stack: str

    def message(self) -> dict[str, Any]:
        return asdict(self)


def beat_path(directory: str, rank: int) -> str:
    return os.path.join(directory, f"heartbeat_{rank}")


def find_hung(directory: str, ranks: Iterable[int], limits: Limits, *, since: float = 0.0) -> str | None:
    """What is wrong with the first of these ranks that hangs, in words; None if all is well. A silent rank goes first.

    Args:
        since: on the monotonic clock; what came before does not count: the machine was paused, and the caller with it.
    """
    now = time.monotonic()
    beats = {rank: beat for rank in ranks if (beat := Beat.read(beat_path(directory, rank)))}
    for rank, beat in beats.items():
        silent = now - max(beat.at, since)
        if silent > limits.heartbeat:
            return f"rank {rank} has given no heartbeat for {silent:.0f} seconds: its process is stopped or starved"
    for rank, beat in beats.items():
        standing, limit = now - max(beat.marked_at, since), limits.stall if beat.step else limits.start
        if standing > limit:
            return f"rank {rank} has made no progress for {standing:.0f} seconds, in phase {beat.phase!r}"
    return None


def report_ranks(directory: str, pids: dict[int, int], *, node: str) -> list[RankReport]:
    """Where each rank is, with its stacks. Wakes stopped ranks, so the caller must end them afterwards."""
    states = {rank: process_state(pid) for rank, pid in pids.items()}
    beats = {rank: Beat.read(beat_path(directory, rank)) for rank in pids}
    for rank, pid in pids.items():
        if beats[rank]:  # it told us that it is prepared: to anything else the signal is deadly
            _signal(pid, DUMP)
            if states[rank].startswith("T"):
                # A stopped process takes the signal when it goes on: where it then is, it was stopped.
                _signal(pid, signal.SIGCONT)
    stacks = {rank: beat_path(directory, rank) + STACKS for rank in pids if beats[rank]}
    _wait_for_files(stacks.values())
    now = time.monotonic()
    reports = []
    for rank, pid in pids.items():
        beat = beats[rank]
        reports.append(
            RankReport(
                rank=rank,
                node=node,
                pid=pid,
                state=states[rank],
                silent=now - beat.at if beat else None,
                marks=beat.marks if beat else 0,
                standing=now - beat.marked_at if beat else None,
                step=beat.step if beat else 0,
                phase=beat.phase if beat else "unknown",
                stack=_stack(stacks.get(rank), pid),
            )
        )
    return reports


def process_state(pid: int) -> str:
    """`S (sleeping)` and the like, from /proc/PID/status; `gone` without one."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "gone"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("State:")), "unknown")


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _wait_for_files(paths: Iterable[str]) -> None:
    """Until every file has content that no longer grows."""
    end, sizes = time.monotonic() + DUMP_SECONDS, None
    while time.monotonic() < end:
        time.sleep(0.2)
        before, sizes = sizes, [os.path.getsize(path) if os.path.exists(path) else 0 for path in paths]
        if sizes == before and all(sizes):
            return


def _stack(path: str | None, pid: int) -> str:
    """The stacks that the rank wrote, else what py-spy or the kernel say of it."""
    text = ""
    if path is not None:
        with contextlib.suppress(OSError):
            text = Path(path).read_text(errors="replace")
    if not text and shutil.which("py-spy"):
        answer = subprocess.run(["py-spy", "dump", "--pid", str(pid)], capture_output=True, text=True, check=False, timeout=20)
        text = answer.stdout
    return text or "no Python stack: the process did not answer\n" + _kernel_stack(pid)


def _kernel_stack(pid: int) -> str:
    parts = []
    for name in ("wchan", "stack"):
        with contextlib.suppress(OSError):
            parts.append(f"kernel {name}: {Path(f'/proc/{pid}/{name}').read_text().strip()}")
    return "\n".join(parts) or "the kernel tells nothing about it (only root may ask)"
