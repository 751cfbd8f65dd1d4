"""`python -m launch logs RUN_DIR`: the output of all ranks as one, in the order of time, each line with its rank and node."""

import argparse
import heapq
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launch.output import STAMP

RANK_LOG = re.compile(r"rank_(\d+)\.log")
# Written by `RankOutput.note` when a rank begins
START = re.compile(r"===== (?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) rank \d+ of \d+(?: on (?P<node>\S+))?: ")
FOLLOW_SECONDS = 0.5


@dataclass(frozen=True, order=True)
class Line:
    """One line of output; sorts by time, then rank, then its place in the file."""

    stamp: str  # UTC, as in the file
    rank: int
    number: int
    node: str
    text: str

    def show(self) -> str:
        clock = _local(self.stamp)
        return f"{clock} [{self.node + ':' if self.node else ''}{self.rank}] {self.text}"


class RankLog:
    """Reads one rank's log as it grows."""

    def __init__(self, path: Path, rank: int):
        self.path = path
        self.rank = rank
        self._offset, self._number, self._rest = 0, 0, b""
        self._node, self._stamp = "", ""

    def read(self) -> Iterator[Line]:
        """The whole lines that came since the last call; a line without a time has that of the line before."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for raw in lines:
            text = raw.decode(errors="replace")
            if start := START.match(text):
                self._node = start["node"] or ""
                self._stamp = _utc(start["time"])
            elif found := STAMP.match(text):
                self._stamp, text = found[1], text[found.end() :]
            self._number += 1
            yield Line(self._stamp, self.rank, self._number, self._node, text)


def main(arguments: Sequence[str]) -> int:
    """Raises:
    ValueError: no logs there, or ranks that have none.
    """
    options = _parser().parse_args(arguments)
    folder = find_logs(Path(options.run_dir))
    logs = [RankLog(path, rank) for rank, path in sorted(rank_logs(folder).items())]
    if options.rank:
        missing = sorted(set(options.rank) - {log.rank for log in logs})
        if missing:
            raise ValueError(f"--rank: no log of rank {', '.join(map(str, missing))} in {folder}, which has {len(logs)} ranks.")
        logs = [log for log in logs if log.rank in options.rank]
    try:
        _show(merge(logs, last_start_only=not options.all))
        while options.follow:
            time.sleep(FOLLOW_SECONDS)
            _show(merge(logs, last_start_only=False))
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # how one ends `--follow`, and what `| head` does
    return 0


def find_logs(directory: Path) -> Path:
    """DIRECTORY/logs, or DIRECTORY itself where the logs are in it.

    Raises:
        ValueError: neither has any.
    """
    for folder in (directory / "logs", directory):
        if folder.is_dir() and rank_logs(folder):
            return folder
    raise ValueError(f"{directory}: no logs of ranks (rank_00000.log) in it or in its logs/. Name a run directory.")


def rank_logs(folder: Path) -> dict[int, Path]:
    found = ((RANK_LOG.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(name[1]): path for name, path in found if name}


def merge(logs: Sequence[RankLog], *, last_start_only: bool) -> Iterator[Line]:
    """Lines of all logs in the order of time, which is kept within each."""
    if not last_start_only:
        yield from heapq.merge(*(log.read() for log in logs))
        return
    yield from heapq.merge(*(_last_start(list(log.read())) for log in logs))


def _last_start(lines: list[Line]) -> list[Line]:
    starts = [index for index, line in enumerate(lines) if START.match(line.text)]
    return lines[starts[-1] :] if starts else lines


def _show(lines: Iterator[Line]) -> None:
    for line in lines:
        sys.stdout.write(line.show() + "\n")
    sys.stdout.flush()


def _utc(local: str) -> str:
    moment = datetime.strptime(local, "%Y-%m-%d %H:%M:%S").astimezone(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _local(stamp: str) -> str:
    if not stamp:
        return " " * 12
    moment = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).astimezone()
    return moment.strftime("%H:%M:%S.%f")[:12]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch logs", description="Merge the output of all ranks of a run by time.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--rank", type=int, action="append", metavar="N", help="only this rank; may be given several times")
    parser.add_argument("--follow", "-f", action="store_true", help="go on showing what comes")
    parser.add_argument("--all", action="store_true", help="earlier starts too; without it the last start of each rank")
    return parser
