"""Exclusive files: two processes that are given the same shard, on one machine or on many, do not write into each other."""

import errno
import fcntl
import os
import time
from pathlib import Path

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def open_locked(path: Path, *, patience: float = 10.0) -> int:
    """Open (or make) a file for writing that no other process holds; closing the handle lets it go.

    Args:
        path: The file; it is not truncated.
        patience: Seconds to wait for another process, which may be about to end.

    Raises:
        ValueError: Another process holds it still.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # its folder was cleared away by a process that finished the set
            path.parent.mkdir(exist_ok=True)
            continue
        try:
            if _try_lock(handle) and _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path}: another process is writing it. Does the same command run twice? Wait for it, or end it, then run again."
            )
        time.sleep(0.05)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in _UNSUPPORTED:  # a file system without locks: the user keeps runs apart
            raise
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file still has this name: its last owner may have renamed it in between."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
