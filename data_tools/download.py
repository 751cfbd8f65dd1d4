"""Fetching one URL whole: bounded in time and size, tried again with back-off, and never taken when it came short."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

SCHEMES = ("http", "https", "s3", "gs", "hf")
MAX_BYTES = 2**28  # of one image file
_BLOCK = 2**18
_GONE = frozenset({400, 401, 403, 404, 405, 406, 410, 414, 451})  # HTTP: asking again will not help


class UnreachableError(Exception):
    """A URL that gave nothing usable; `permanent`: the server said that it never will. The message is the cause."""

    def __init__(self, cause: str, *, permanent: bool) -> None:
        super().__init__(cause)
        self.permanent = permanent

    def __reduce__(self) -> Any:
        return _rebuild, (str(self), self.permanent)


def _rebuild(cause: str, permanent: bool) -> UnreachableError:
    return UnreachableError(cause, permanent=permanent)


def download(
    url: str, *, attempts: int = 5, timeout: float = 30.0, pause: float = 0.5, sleep: Callable[[float], None] = time.sleep
) -> bytes:
    """The bytes behind a URL.

    Args:
        attempts: Tries before it counts as unreachable.
        timeout: Seconds without a byte after which a try is given up.
        pause: Seconds before the second try; doubled each time.

    Raises:
        UnreachableError: Gone, too large, or all attempts failed.
        ValueError: A scheme that is not allowed, or whose package is missing.
    """
    fetch = _fetch_http if check_url(url) in ("http", "https") else _fetch_with_fsspec
    for attempt in range(attempts):
        try:
            return fetch(url, timeout)
        except UnreachableError as error:
            if error.permanent or attempt == attempts - 1:
                raise
        sleep(pause * 2**attempt)
    raise AssertionError("attempts is at least 1")


def check_url(url: str) -> str:
    """The scheme of a URL.

    Raises:
        ValueError: It is not allowed (file: would read what the list's author does not see).
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise ValueError(f"{url}: URLs may start with {', '.join(name + '://' for name in SCHEMES)}. Give local files as paths.")
    return scheme


def _fetch_http(url: str, timeout: float) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "simmim-scale"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = _read_bounded(response)
            expected = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        raise UnreachableError(f"HTTP {error.code} {error.reason}", permanent=error.code in _GONE) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UnreachableError(f"{type(error).__name__}: {error}", permanent=isinstance(error, http.client.InvalidURL)) from error
    if expected is not None and expected.isdigit() and int(expected) != len(data):
        raise UnreachableError(f"{len(data)} of {expected} bytes came", permanent=False)
    return data


def _fetch_with_fsspec(url: str, timeout: float) -> bytes:
    try:
        import fsspec

        with fsspec.open(url, "rb") as file:
            return _read_bounded(file)
    except ImportError as error:
        raise ValueError(f'{url}: needs a package ({error}). Install it: pip install "simmim-scale[cloud]".') from error
    except FileNotFoundError as error:
        raise UnreachableError(f"not found ({error})", permanent=True) from error
    except OSError as error:
        raise UnreachableError(f"{type(error).__name__}: {error}", permanent=False) from error


def _read_bounded(stream: Any) -> bytes:
    blocks, total = [], 0
    while block := stream.read(_BLOCK):
        blocks.append(block)
        total += len(block)
        if total > MAX_BYTES:
            raise UnreachableError(f"more than {MAX_BYTES:,} bytes, too large for an image", permanent=True)
    return b"".join(blocks)
