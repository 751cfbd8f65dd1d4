"""The output of a rank: all of it to a log file, and for an echoed rank also to where `python -m launch` writes."""

import contextlib
import fcntl
import os
import pty
import re
import select
import termios
import time
import tty
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from launch.transcript import Transcript

READ_AT_ONCE = 65536  # bytes
WRITE_AT_ONCE = 4096  # bytes: PIPE_BUF, which a pipe that reports itself writable takes without blocking
MOST_WAITING = 1 << 20  # bytes for a terminal that is not read; training goes on, and the log file has everything
DRAIN_SECONDS = 2.0
STAMP = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ?")


def log_path(log_dir: str | Path, rank: int) -> Path:
    return Path(log_dir) / f"rank_{rank:05d}.log"


def time_stamp() -> str:
    """Now, as lines in a log file begin: UTC, since nodes may differ in their time zone."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


def without_stamp(line: str) -> str:
    """A line of a log file as the rank wrote it."""
    return STAMP.sub("", line, count=1)


class Echo:
    """Writes to somebody else's descriptor without ever waiting for it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self._waiting = bytearray()
        self._skipped = False

    def write(self, data: bytes) -> None:
        if len(self._waiting) + len(data) > MOST_WAITING:
            # whoever reads has stopped to: rather lose a piece of the picture than the pace of the run
            self._waiting.clear()
            self._skipped = True
        self._waiting += data
        self.flush(seconds=0.0)

    def flush(self, *, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._waiting and select.select([], [self.descriptor], [], max(0.0, end - time.monotonic()))[1]:
            if self._skipped:
                self._waiting[:0] = b"\n[... output left out here; the log file has it ...]\n"
                self._skipped = False
            try:
                written = os.write(self.descriptor, self._waiting[:WRITE_AT_ONCE])
            except BlockingIOError:
                return
            except OSError:
                # the terminal or the pipe is closed (a lost connection); the run goes on and its log file has everything
                self._waiting.clear()
                return
            del self._waiting[:written]


@dataclass
class Stream:
    """One output of the rank: where it writes (`inner`), where the keeper reads (`outer`), who else sees it."""

    inner: int
    outer: int
    echo: Echo | None = None
    transcript: Transcript | None = None  # for a terminal


class RankOutput:
    """stdout and stderr of one rank.

    A rank whose output goes on to a terminal gets a terminal of its own, so that its progress bar draws; otherwise a pipe.

    Args:
        log_dir: directory of the log files.
        rank: which rank.
        echo: descriptors of the stdout and stderr that also get everything; empty for none.
    """

    def __init__(self, log_dir: str, rank: int, *, echo: list[int]):
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self._log = os.open(log_path(log_dir, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._terminal = next((descriptor for descriptor in echo if os.isatty(descriptor)), None)
        echoes = [Echo(descriptor) for descriptor in echo] or [None, None]
        self._stdout = self._open(echoes[0])
        # one stream for both where both end in one place, so that their lines keep their order
        self._stderr = self._stdout if _same_place(echo) else self._open(echoes[1])
        self._line_open = False  # the last line in the log has no end yet
        self._streams = [self._stdout] if self._stderr is self._stdout else [self._stdout, self._stderr]
        self._resize_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams:
            os.close(stream.outer)
        os.close(self._log)

    @property
    def stdout(self) -> int:
        return self._stdout.inner

    @property
    def stderr(self) -> int:
        return self._stderr.inner

    @property
    def sources(self) -> list[int]:
        return [stream.outer for stream in self._streams]

    def _open(self, echo: Echo | None) -> Stream:
        if echo is None or not os.isatty(echo.descriptor):
            outer, inner = os.pipe()
            return Stream(inner=inner, outer=outer, echo=echo)
        outer, inner = pty.openpty()
        # The real terminal turns newlines into its own; doing it here too would double the carriage returns.
        mode = termios.tcgetattr(inner)
        mode[tty.OFLAG] &= ~termios.OPOST
        termios.tcsetattr(inner, termios.TCSANOW, mode)
        return Stream(inner=inner, outer=outer, echo=echo, transcript=Transcript())

    def note(self, text: str) -> None:
        """A line of ours in the log file, to tell the starts of a resumed run apart."""
        self._append(f"===== {time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())

    def started(self) -> None:
        """The rank has its ends of the streams; held open here they would never report the end."""
        for stream in self._streams:
            os.close(stream.inner)

    def read(self, source: int) -> bool:
        """Takes what has arrived on one of `sources`; False at its end."""
        stream = self._streams[self.sources.index(source)]
        try:
            data = os.read(source, READ_AT_ONCE)
        except OSError:  # a pseudo-terminal reports its end as an error
            data = b""
        if data and stream.echo:
            stream.echo.write(data)
        self._append(self._stamp(stream.transcript.feed(data) if stream.transcript else data))
        return bool(data)

    def tick(self) -> None:
        """Regular duties: what the terminal has not taken yet, and its size, which a person may have changed."""
        for stream in self._streams:
            if stream.echo:
                stream.echo.flush(seconds=0.0)
        if self._terminal is not None and time.monotonic() > self._resize_at:
            self._resize_at = time.monotonic() + 1.0
            self._copy_size()

    def _copy_size(self) -> None:
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(self._terminal, termios.TIOCGWINSZ, bytes(8))
            for stream in self._streams:
                if stream.transcript:
                    fcntl.ioctl(stream.outer, termios.TIOCSWINSZ, size)

    def drain(self) -> None:
        """Takes the rest, after the rank and its descendants have ended."""
        end = time.monotonic() + DRAIN_SECONDS
        open_sources = set(self.sources)
        while open_sources and time.monotonic() < end:
            for source in select.select(list(open_sources), [], [], 0.1)[0]:
                if not self.read(source):
                    open_sources.discard(source)
        for stream in self._streams:
            if stream.transcript:
                self._append(self._stamp(stream.transcript.finish()))
            if stream.echo:
                stream.echo.flush(seconds=DRAIN_SECONDS)

    def _stamp(self, data: bytes) -> bytes:
        """The time before every line, which lets the logs of all ranks be merged."""
        if not data:
            return data
        stamp = time_stamp().encode() + b" "
        stamped = (b"" if self._line_open else stamp) + data[:-1].replace(b"\n", b"\n" + stamp) + data[-1:]
        self._line_open = not data.endswith(b"\n")
        return stamped

    def _append(self, data: bytes) -> None:
        # A full disk must not end the rank: it has a save to write, and its own error to show.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._log, data) :]


def _same_place(descriptors: list[int]) -> bool:
    """Whether two descriptors are one terminal, file or pipe; none at all is a log file only."""
    places = {(found.st_dev, found.st_ino) for found in map(os.fstat, descriptors)}
    return len(places) <= 1
