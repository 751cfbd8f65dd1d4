"""Running one function over many items in several processes or on a Ray cluster, with results in the order of the items."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_AHEAD = 2  # items a process that are handed out before they are needed


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(function: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """Yield function(item) for each item, in order, computed by `jobs` processes (1: by this one).

    `function` must be importable and items and results picklable. Items are taken as they are needed. The first exception ends
    the run and is raised here; the processes end with this one, however it ends, and are ended when it is interrupted.

    Raises:
        OSError: A process was killed.
    """
    if jobs == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_follow_parent, initargs=(os.getpid(),))
    try:
        yield from _in_order(lambda item: _submit(pool, function, item), items, _AHEAD * jobs)
    except BrokenProcessPool as error:
        raise OSError(
            f"one of {jobs} processes was killed, most likely for want of memory. Try again with fewer --jobs."
        ) from error
    except (KeyboardInterrupt, GeneratorExit):  # nobody waits for what they are at
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[Item], Result], item: Item) -> "Future[Result]":
    """Hand out an item. This may start a process, which would die of Ctrl-C before `_follow_parent` is called."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _in_order(submit: Callable[[Item], "Future[Result]"], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(submit(item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _follow_parent(parent: int) -> None:
    """In a worker: leave Ctrl-C to the parent, and die with it (a killed parent would leave workers that wait forever)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    # Systems without prctl, and a parent that died before it was called.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
