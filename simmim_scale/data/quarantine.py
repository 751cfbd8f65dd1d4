"""The list of images that could not be decoded: one JSON object a line, each image once, in the run directory."""

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DamagedSample:
    """An image that could not be decoded, by number and name, with the cause and the sample that was used instead."""

    sample: int
    name: str
    cause: str
    replacement: int


class Quarantine:
    """Keeps the list of one rank.

    Every rank writes a file of its own, since appending to one file from several machines loses lines. An image that any rank
    listed before this run started is not listed again. Images are told apart by name, since training and validation number theirs
    separately.

    Args:
        directory: Holds the lists; made with the first entry. None: damaged images are logged and counted, not listed.
        rank: Whose list to append to.
    """

    def __init__(self, directory: Path | None, *, rank: int = 0):
        self.path = None if directory is None else directory / f"rank-{rank:05d}.jsonl"
        self.num_replaced = 0
        self._seen = set() if directory is None else _read_names(directory)

    def __len__(self) -> int:
        """Different images listed, those of earlier runs included."""
        return len(self._seen)

    def add(self, damaged: DamagedSample) -> None:
        """Counts a replacement, and lists the image if it is new."""
        self.num_replaced += 1
        if damaged.name in self._seen:
            return
        self._seen.add(damaged.name)
        log.warning("%s does not decode (%s); sample %d is used instead.", damaged.name, damaged.cause, damaged.replacement)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                file.write(_line_break(file) + json.dumps(asdict(damaged), ensure_ascii=False).encode() + b"\n")


def _line_break(file: BinaryIO) -> bytes:
    """What ends the last line of a file if a killed run left it half-written."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return b""
    file.seek(size - 1)
    return b"" if file.read(1) == b"\n" else b"\n"


def _read_names(directory: Path) -> set[str]:
    """Images in all lists of a directory. A last line that a killed run left half-written is skipped."""
    names = set()
    for path in sorted(directory.glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                names.add(str(json.loads(line)["name"]))
            except (json.JSONDecodeError, KeyError, TypeError):
                log.warning("%s: skipped a line that is no entry: %.80s", path, line)
    return names
