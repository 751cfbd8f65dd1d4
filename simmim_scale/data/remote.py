"""Files in a remote directory (s3://, gs://, https://, hf:// ...) through fsspec: read in pieces, tried again, checked.

A piece that fails is asked for again after a pause that doubles; a file whose sha256 does not come out right is fetched anew.
"""

import errno
import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from simmim_scale.config.schema import RemoteConfig

log = logging.getLogger(__name__)
T = TypeVar("T")

PIECE = 16 * 2**20  # bytes asked for at once
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 60.0  # seconds
# Answers that do not change by asking again: HTTP status codes.
FINAL_STATUS = {400, 401, 403, 404, 405, 410}


class RemoteError(OSError):
    """A remote file that could not be read whole and right, however often it was tried."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL, as against a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", location, re.IGNORECASE) is not None


class RemoteDirectory:
    """Reads files of a remote directory. It may travel to other processes: each opens connections of its own.

    Args:
        url: The directory.
        remote: Attempts, patience, and options of the file system.
    """

    def __init__(self, url: str, remote: RemoteConfig):
        self.url = url.rstrip("/")
        self.remote = remote
        self._process = 0
        self._lock = threading.Lock()
        self._opened: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "remote": self.remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, name: str, *, sha256: str | None = None) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError, PermissionError: The server says so.
            RemoteError: It could not be read, or never had the checksum.
        """
        filesystem, root = self._filesystem()

        def fetch() -> bytes:
            data = self._call(filesystem.cat_file, f"{root}/{name}")
            if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
                raise RemoteError(f"{self.url}/{name}: its sha256 is not what the index states.")
            return data

        return self._again(fetch, f"{self.url}/{name}")

    def download(self, name: str, file: BinaryIO, *, size: int, sha256: str) -> None:
        """Writes a file of known size and checksum into `file`, which is synced.

        Raises:
            FileNotFoundError, PermissionError: The server says so.
            RemoteError: It could not be read, or never had the checksum.
        """
        for attempt in range(self.remote.attempts):
            file.seek(0)
            digest = self._download_once(name, file, size)
            if digest == sha256:
                file.flush()
                os.fsync(file.fileno())
                return
            log.warning("%s/%s: arrived with sha256 %s, expected %s; fetching it again.", self.url, name, digest, sha256)
            self._pause(attempt)
        raise RemoteError(
            f"{self.url}/{name}: sha256 was wrong {self.remote.attempts} times, expected {sha256}. The file there is not the one"
            " that the index describes: copy it there again."
        )

    def _download_once(self, name: str, file: BinaryIO, size: int) -> str:
        """Writes the file piece by piece and returns its sha256."""
        digest = hashlib.sha256()
        at = 0
        while at < size:
            piece = self._again(lambda at=at: self._piece(name, at, min(at + PIECE, size), size), f"{self.url}/{name}")
            file.write(piece)
            digest.update(piece)
            at += len(piece)
        return digest.hexdigest()

    def _piece(self, name: str, start: int, stop: int, size: int) -> bytes:
        filesystem, root = self._filesystem()
        data = self._call(filesystem.cat_file, f"{root}/{name}", start=start, end=stop)
        if len(data) == size:  # a server that ignores ranges sends everything
            return data[start:]
        if len(data) != stop - start:
            raise RemoteError(f"{self.url}/{name}: got {len(data):,} bytes of the {stop - start:,} from {start:,} on.")
        return data

    def _call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Calls a file system's function, for at most `timeout_s` seconds."""
        if getattr(self._filesystem()[0], "async_impl", False):
            return function(*arguments, **options, timeout=self.remote.timeout_s)
        return _call_in_time(lambda: function(*arguments, **options), self.remote.timeout_s)

    def _again(self, action: Callable[[], T], what: str) -> T:
        """Tries until it works, at most `attempts` times."""
        for attempt in range(self.remote.attempts):
            try:
                return action()
            except Exception as error:
                if _is_final(error):
                    raise _refusal(what, error) from error
                cause = error
                log.warning("%s: %s (attempt %d of %d)", what, _short(error), attempt + 1, self.remote.attempts)
                if attempt + 1 < self.remote.attempts:
                    self._pause(attempt)
        raise RemoteError(
            f"{what}: not read after {self.remote.attempts} attempts; the last one: {_short(cause)}."
            " Check the network and the server, then run the same command again; data.remote.attempts and data.remote.timeout_s"
            " set the patience."
        ) from cause

    def _pause(self, attempt: int) -> None:
        # Spread out, since all nodes see a server fail at the same moment. Nothing that is computed depends on it.
        time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * (0.5 + 0.5 * random.SystemRandom().random()))

    def _filesystem(self) -> tuple[Any, str]:
        """The file system and the directory's path in it, opened once per process: connections do not survive a fork."""
        with self._lock:
            if self._opened is None or self._process != os.getpid():
                self._opened = _open_filesystem(self.url, self.remote.options)
                self._process = os.getpid()
            return self._opened


def _open_filesystem(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        raise ValueError(f"{url}: {error}. Remote shards need: pip install 'simmim-scale[cloud]'.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{url}: cannot be opened ({error}). Check the URL and data.remote.options.") from error
    return filesystem, path.rstrip("/")


def _call_in_time(action: Callable[[], T], timeout: float) -> T:
    """Runs a blocking call in a thread and leaves it behind if it takes too long."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((action(), None))
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if not results:
        raise TimeoutError(f"no answer within {timeout:g} s")
    value, error = results[0]
    if error is not None:
        raise error
    return value


def _is_final(error: Exception) -> bool:
    """Whether asking again cannot help."""
    if getattr(error, "errno", None) == errno.ENOSPC:
        return True
    if isinstance(error, FileNotFoundError | PermissionError | ValueError | TypeError | ImportError):
        return True
    return getattr(error, "status", None) in FINAL_STATUS


def _refusal(what: str, error: Exception) -> Exception:
    """What to raise for an error that asking again cannot help: itself, or a RemoteError in place of a network library's own."""
    if isinstance(error, OSError | ValueError | TypeError | ImportError):
        return error
    return RemoteError(f"{what}: the server refuses it ({_short(error)}). Check the URL and the access rights.")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
