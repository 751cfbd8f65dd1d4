"""What the kernel is asked for so that no process outlives its supervisor: death signals, subreapers, sweeps.

These are Linux calls (prctl(2)); elsewhere they do nothing and only the sockets between the processes tell that somebody is gone.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable

import psutil

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36

# Asked of `python -m launch`, and passed on to every rank. A closed terminal (SIGHUP) is a request to stop like any other.
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, so that it can reap or end them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int, *, parent: int) -> None:
    """This process gets signal `number` when `parent` ends; at once if it has ended already."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def die_with_this(number: int) -> Callable[[], None]:
    """For `Popen(preexec_fn=...)`: the child gets `number` when this process ends, by whatever means."""
    parent = os.getpid()
    return lambda: die_with_parent(number, parent=parent)


def watch_signals(numbers: Iterable[int]) -> int:
    """A non-blocking descriptor that gives one byte, the number, for each of these signals; they interrupt nothing."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, _noticed)
    return reader


def _noticed(number: int, frame: object) -> None:
    """Nothing: the byte in the wake-up descriptor is the notice. Ignoring the signal would give no byte."""


def read_signals(descriptor: int) -> list[int]:
    """The signals that arrived since the last call; SIGHUP is reported as SIGTERM."""
    with contextlib.suppress(BlockingIOError):
        return [signal.SIGTERM if number == signal.SIGHUP else number for number in os.read(descriptor, 4096)]
    return []


def sweep(keep: Iterable[int] = ()) -> None:
    """Ends every descendant of this process but those in `keep`, in any session, and reaps those that are children."""
    kept = set(keep)
    # twice: a process may have started another one in between
    for _ in range(2):
        left = [child for child in psutil.Process().children(recursive=True) if child.pid not in kept]
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(left, timeout=2)


def reap(pids: Iterable[int]) -> None:
    """Collects those of the adopted processes `pids` that have ended, so that they do not stay as zombies."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def exit_code(status: int) -> int:
    """A return code of subprocess as a shell shows it: 128 + number for a process that a signal ended."""
    return status if status >= 0 else 128 - status


def describe_status(status: int) -> str:
    """`exit code 1`, or the name of the signal that ended the process."""
    if status >= 0:
        return f"exit code {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"
