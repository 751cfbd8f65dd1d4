"""A webdataset tar whose bytes depend on nothing but its members, hashed while it is written."""

import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simmim_scale.data.shards import ROW, ShardFile, sync_directory

_PADDING = bytes(tarfile.BLOCKSIZE)


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
        self._file: io.BufferedWriter = open(self._aside, "wb")  # noqa: SIM115 closed in __exit__
        self._digest = hashlib.sha256()
        self._offset = 0
        self._rows: list[tuple[int, int, int, int, int]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: str, image: bytes, extension: str, companions: dict[str, bytes], label: int) -> None:
        """Append a sample: its image first, then its companions (extension -> content) in their order."""
        start = self._offset
        header = _header(f"{key}.{extension}", len(image))
        self._member(header, image)
        for name, content in companions.items():
            self._member(_header(f"{key}.{name}", len(content)), content)
        self._rows.append((start, self._offset - start, len(header), len(image), label))

    def finish(self) -> Shard:
        """Close the tar, force it to disk and rename it into place."""
        end = bytes(2 * tarfile.BLOCKSIZE)
        self._write(end + bytes(-(self._offset + len(end)) % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self._path)
        sync_directory(self._path.parent)
        file = ShardFile(self._path.name, len(self._rows), self._offset, self._digest.hexdigest())
        return Shard(file, np.array(self._rows, dtype=ROW))

    def _member(self, header: bytes, content: bytes) -> None:
        self._write(header)
        self._write(content)
        self._write(_PADDING[: -len(content) % tarfile.BLOCKSIZE])

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


def _header(name: str, size: int) -> bytes:
    """Tar header of a plain file that anyone may read, without time or owner."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
