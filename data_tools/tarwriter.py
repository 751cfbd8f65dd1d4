"""A webdataset tar whose bytes depend on nothing but its members, hashed while it is written."""

import hashlib
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.locks import open_locked
from simmim_scale.data.shards import ROW, ShardFile, sync_directory

_PADDING = bytes(tarfile.BLOCKSIZE)
_LARGEST = np.iinfo(np.uint32).max  # bytes of a sample: the index counts them in 32 bits
_NAME = 100  # bytes of the name in a header
# A ustar header without time or owner, around name, size, checksum and kind.
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2
_AFTER_SIZE = b"00000000000\0"
_AFTER_KIND = bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
_CONSTANT_SUM = sum(_BEFORE_SIZE + _AFTER_SIZE + _AFTER_KIND) + 8 * ord(" ")


@dataclass(frozen=True)
class Shard:
    """A finished tar and the rows of its samples."""

    file: ShardFile
    rows: np.ndarray


class ShardWriter:
    """Writes one shard aside; `finish` makes it durable and gives it its name. Use as a context manager.

    Leaving the block without `finish` removes what was written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_name(f".{path.name}.part")
        self._handle = open_locked(self._aside)
        os.ftruncate(self._handle, 0)
        self._digest = hashlib.sha256()
        self._offset = 0
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._finished = False

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            self._aside.unlink(missing_ok=True)  # while the lock is held: it is ours
        os.close(self._handle)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: str, image: bytes, extension: str, companions: dict[str, bytes], label: int) -> None:
        """Append a sample: its image first, then its companions (extension -> content) in their order."""
        start = self._offset
        header = tar_header(f"{key}.{extension}", len(image))
        members = [(header, image)]
        members += [(tar_header(f"{key}.{name}", len(content)), content) for name, content in companions.items()]
        if sum(len(header) + len(content) + tarfile.BLOCKSIZE for header, content in members) > _LARGEST:
            raise ValueError(f"{key}: a sample may have {_LARGEST:,} bytes. Make the image smaller (--max-side).")
        head, *tail = members
        rest = b"".join(part for header_, content in tail for part in _member(header_, content))
        self._write(*_member(*head), rest)
        self._rows.append((start, self._offset - start, len(header), len(image), label))

    def finish(self, before: Callable[[Shard], None] = lambda _: None) -> Shard:
        """Close the tar, force it to disk and rename it into place.

        Args:
            before: Called with the shard just before it gets its name. With the name goes the lock: whoever opens the file after
                that must find all there is to know about it.
        """
        end = bytes(2 * tarfile.BLOCKSIZE)
        self._write(end + bytes(-(self._offset + len(end)) % tarfile.RECORDSIZE))
        os.fsync(self._handle)
        file = ShardFile(self._path.name, len(self._rows), self._offset, self._digest.hexdigest())
        shard = Shard(file, np.array(self._rows, dtype=ROW))
        before(shard)
        os.replace(self._aside, self._path)
        self._finished = True
        sync_directory(self._path.parent)
        return shard

    def _write(self, *parts: bytes) -> None:
        """Append the parts: one system call a sample, and no copy of the image."""
        for part in parts:
            self._digest.update(part)
        total = sum(map(len, parts))
        written = os.writev(self._handle, parts)
        rest = memoryview(b"".join(parts))[written:] if written < total else memoryview(b"")
        while rest:  # a nearly full disk takes a part, then refuses
            rest = rest[os.write(self._handle, rest) :]
        self._offset += total


def _member(header: bytes, content: bytes) -> tuple[bytes, bytes, bytes]:
    return header, content, _PADDING[: -len(content) % tarfile.BLOCKSIZE]


def member_bytes(size: int) -> int:
    """Bytes that a member of `size` bytes takes in a tar, with a short name."""
    return tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE


def tar_header(name: str, size: int) -> bytes:
    """Tar header (POSIX ustar, pax for what does not fit) of a plain file that anyone may read, without time or owner.

    Not left to `tarfile`, whose bytes differ between versions of Python; also, every sample has three.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) <= _NAME and name.isascii():
        return _ustar(encoded, size, b"0")
    record = b" path=" + encoded + b"\n"
    length = len(record)
    while len(str(length)) + len(record) != length:  # it counts its own digits
        length = len(str(length)) + len(record)
    records = str(length).encode() + record
    padding = bytes(-len(records) % tarfile.BLOCKSIZE)
    short = name.encode("ascii", "replace")[:_NAME]
    return _ustar(b"././@PaxHeader", len(records), b"x") + records + padding + _ustar(short, size, b"0")


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    octal = b"%011o\0" % size
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(name) + sum(octal) + kind[0])
    return name.ljust(_NAME, b"\0") + _BEFORE_SIZE + octal + _AFTER_SIZE + checksum + kind + _AFTER_KIND
