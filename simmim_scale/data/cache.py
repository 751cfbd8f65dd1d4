"""A bounded directory of remote shards, shared by all processes of a node.

Every shard is downloaded by one process while the others wait, appears complete and checked, and is dropped when room is needed,
the one used longest ago first. Locks are the operating system's, so a killed process leaves none behind.
"""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from simmim_scale.data.remote import RemoteDirectory, RemoteError
from simmim_scale.data.shards import ShardFile

log = logging.getLogger(__name__)

ROOM_LOCK = ".room.lock"
# A shard that was used so recently is needed again soon, seconds.
RECENT = 60.0


class ShardCache:
    """Local copies of remote shards.

    Args:
        source: Where they come from.
        shards: The shards, with sizes and checksums.
        directory: Where to keep those of this set.
        root: The directory that `limit` is for: it may hold other sets.
        limit: Most bytes that shards in `root` take.
    """

    def __init__(self, source: RemoteDirectory, shards: tuple[ShardFile, ...], *, directory: Path, root: Path, limit: int):
        largest = max(shards, key=lambda shard: shard.bytes)
        if largest.bytes > limit:
            raise ValueError(
                f"data.remote.cache_gb: {limit / 1e9:g} GB do not hold the largest shard, {largest.name} with"
                f" {largest.bytes / 1e9:.3g} GB. Raise it."
            )
        self.source = source
        self.shards = shards
        self.directory = directory
        self.root = root
        self.limit = limit
        self._warned = False

    def open(self, shard: int) -> BinaryIO:
        """The local copy of a shard, downloaded if there is none, marked as used."""
        while True:
            try:
                file = open(self.path(shard), "rb")  # noqa: SIM115 - the caller closes it
            except FileNotFoundError:
                self.fetch(shard)
                continue  # another process may have dropped it already
            self.touch(shard)
            return file

    def path(self, shard: int) -> Path:
        return self.directory / self.shards[shard].name

    def touch(self, shard: int) -> None:
        """Marks a shard as used now, if it is here."""
        try:
            os.utime(self.path(shard))
        except FileNotFoundError:
            return

    def fetch(self, shard: int, *, spare_recent: bool = False) -> bool:
        """Downloads a shard unless it is here.

        Args:
            spare_recent: Rather do nothing than drop shards that were used a moment ago.

        Returns:
            Whether it is here now.

        Raises:
            FileNotFoundError, PermissionError, RemoteError: It cannot be had.
        """
        path, part = self.path(shard), self.path(shard).with_name(f".{self.shards[shard].name}.part")
        with _locked(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return True
            if not self._reserve(part, self.shards[shard].bytes, spare_recent=spare_recent):
                return False
            try:
                with open(part, "r+b") as file:
                    entry = self.shards[shard]
                    self.source.download(entry.name, file, size=entry.bytes, sha256=entry.sha256)
                os.replace(part, path)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise RemoteError(f"{self.root}: the disk is full. Free some, or lower data.remote.cache_gb.") from error
                raise
            finally:
                part.unlink(missing_ok=True)
        return True

    def _reserve(self, part: Path, size: int, *, spare_recent: bool) -> bool:
        """Makes room and takes it, by a file of the final size that holds nothing yet."""
        while True:
            with _locked(self.root / ROOM_LOCK):
                victims, missing = self._choose_victims(size)
                recent = [path for used, path in victims if time.time() - used < RECENT]
                if spare_recent and (recent or missing > 0):
                    return False
                if missing <= 0:
                    if recent:
                        self._warn(recent[0])
                    for _, path in victims:
                        path.unlink(missing_ok=True)
                    with open(part, "wb") as file:
                        file.truncate(size)
                    return True
            time.sleep(0.1)  # other processes fill the cache right now; what they write can be dropped when it is complete

    def _choose_victims(self, size: int) -> tuple[list[tuple[float, Path]], int]:
        """What to drop so that `size` bytes fit, with the time of its last use, and the bytes that are missing even then."""
        kept = sorted(_shards_by_use(self.root))
        missing = sum(length for _, length, _ in kept) + size - self.limit
        victims = []
        for used, length, path in kept:
            if missing <= 0:
                break
            if path.suffix == ".part" and not _is_abandoned(path):
                continue
            victims.append((used if path.suffix != ".part" else 0.0, path))
            missing -= length
        return victims, missing

    def _warn(self, path: Path) -> None:
        if not self._warned:
            log.warning(
                "data.remote.cache_gb: %g GB do not hold the shards that are in use at a time;"
                " %s is dropped and will be fetched again. Raise it, or lower data.mixed_shards.",
                self.limit / 1e9,
                path.name,
            )
        self._warned = True


def _shards_by_use(root: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of last use, size and path of all shards under a directory, those that are still being written included."""
    for path in root.glob("*/*"):
        if path.name.endswith((".tar", ".tar.part")):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            yield status.st_mtime, status.st_size, path


def _is_abandoned(part: Path) -> bool:
    """Whether the process that wrote a part is gone: then its lock is free."""
    with open(part.with_name(part.name.removesuffix(".part") + ".lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file, across processes and threads; it is free again when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
