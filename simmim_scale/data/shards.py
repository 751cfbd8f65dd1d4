"""The index of a directory of shards: which sample lies where. Pure and torch-free; the data tools write it, training reads it.

    DIR/<shard>.tar   plain webdataset tars: the members of one sample share their key and stand one after the other
    DIR/index.npy     one row a sample, in shard order (`ROW`); opened by memory map, so 14 million samples cost nothing to open
    DIR/index.json    the shards with their counts, bytes and sha256, class names, source, options, and the sha256 of index.npy
                      and of its own content (which older versions did not write)

`index.json` is written last: a directory that has one is complete. Shard of a row = where the row falls in the cumulative counts.
"""

import hashlib
import io
import json
import os
import secrets
import tarfile
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT = "simmim-shards"
VERSION = 1
INDEX_NAME = "index.json"
TABLE_NAME = "index.npy"
NOTES = ".shards"  # directory of notes in an unfinished set
NO_LABEL = -1

_REQUIRED = ("samples", "shards", "table")
# Entries of an index without a checksum; there never was one with others.
_ENTRIES = {"format", "version", "kind", "created_with", "source", "options", "classes", "bytes", "gaps", *_REQUIRED}
# What np.load raises on damaged headers, as found by changing each of their bits.
_TABLE_ERRORS = (ValueError, OSError, EOFError, TypeError, OverflowError, SyntaxError, tokenize.TokenError)

# Little-endian whatever the machine, so that equal shards have equal bytes.
ROW = np.dtype(
    [
        ("offset", "<u8"),  # bytes from the start of the shard to the first tar header of the sample
        ("length", "<u4"),  # bytes of all its members: headers, data and padding
        ("image", "<u4"),  # bytes from `offset` to the first byte of the image's data
        ("image_bytes", "<u4"),  # bytes of the image's data
        ("label", "<i4"),  # class, an index into the class names; NO_LABEL: none
    ]
)


class DamageError(ValueError):
    """A set of shards that is not what it was when it was written: the problem, and how to get it back."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}"


@dataclass(frozen=True)
class ShardFile:
    """One tar: its file name (no directories), its samples, its size in bytes and the sha256 of its content in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SampleLocation:
    """Where a sample lies. `shard` is an index into `ShardIndex.shards`; all offsets count bytes from the start of that shard."""

    shard: int
    offset: int
    length: int
    image_offset: int
    image_bytes: int
    label: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a directory of shards.

    Args:
        directory: Where the shards are.
        shards: The tars, in the order of the table.
        table: One `ROW` a sample, ordered by shard and then by offset.
        classes: Names of the classes, by label; None: unlabelled.
        kind: What the samples are, e.g. "folder" (the source command).
        created_with: Program and version that wrote the shards.
        source: Where the samples came from, any JSON value.
        options: Options that determine the bytes of the shards, any JSON mapping.
        gaps: Numbers that the series of shard names leaves out on purpose (none of their images could be used).
    """

    directory: Path
    shards: tuple[ShardFile, ...]
    table: np.ndarray
    classes: tuple[str, ...] | None = None
    kind: str = "folder"
    created_with: str = ""
    source: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    gaps: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> Any:
        # A worker process opens the files again; pickling the table would send it whole, 340 MB for ImageNet-22K.
        return _reopen, (str(self.directory),)

    @cached_property
    def starts(self) -> np.ndarray:
        """(shards + 1,) int64: row at which each shard starts; the last entry is the number of samples."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)]).astype(np.int64)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, check: bool = True) -> "ShardIndex":
        """Opens a directory of shards.

        Args:
            directory: A directory written by `python -m data_tools shard`.
            check: Compare the table with its checksum and the shards with their sizes. Contents of shards are not read.

        Raises:
            ValueError: Anything missing, empty or foreign: which file, and what to do. DamageError: lost or damaged.
        """
        path = Path(directory)
        document = read_document(path)
        shards = tuple(_parse_shard(path, entry) for entry in document["shards"])
        classes = document.get("classes")
        index = cls(
            directory=path,
            shards=shards,
            table=_open_table(path, document),
            classes=None if classes is None else tuple(classes),
            kind=document.get("kind", ""),
            created_with=document.get("created_with", ""),
            source=document.get("source"),
            options=document.get("options") or {},
            gaps=tuple(document.get("gaps") or ()),
        )
        index._check_counts(expected=document["samples"])
        if check:
            index.check_table(document)
            index._check_files()
        return index

    def check_table(self, document: dict[str, Any] | None = None) -> None:
        """Compares the table with its checksum in index.json (`document`, where it was read), its rows with shards and classes.

        Raises:
            DamageError: They disagree.
        """
        document = document or read_document(self.directory)
        with open(self.directory / TABLE_NAME, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != document["table"].get("sha256"):
            problem = f"sha256 {digest} is not what {INDEX_NAME} states; the two disagree or the file is damaged"
            raise _index_damage(self.directory, f"{self.directory / TABLE_NAME}: {problem}")
        self._check_rows()

    def write(self, directory: str | os.PathLike[str] | None = None) -> None:
        """Writes index.npy, then index.json, each aside, synced and renamed. The shards must be in place already.

        Equal indexes give equal bytes: the document holds no time and no path but what `source` says.

        Raises:
            ValueError: Shards and table disagree, or a shard is missing or has another size than stated.
        """
        path = Path(self.directory if directory is None else directory)
        in_place = ShardIndex(**{**_arguments(self), "directory": path})
        in_place._check_counts(expected=len(self.table))
        in_place._check_rows()
        in_place._check_files()
        table = io.BytesIO()
        np.save(table, np.ascontiguousarray(self.table, dtype=ROW), allow_pickle=False)
        with atomic_file(path / TABLE_NAME) as file:
            file.write(table.getbuffer())
        with atomic_file(path / INDEX_NAME) as file:
            file.write(self._document(hashlib.sha256(table.getbuffer()).hexdigest()))

    def shard_path(self, shard: int) -> Path:
        return self.directory / self.shards[shard].name

    def locate(self, sample: int) -> SampleLocation:
        """Where sample number `sample` (0 to len - 1) lies."""
        if not 0 <= sample < len(self.table):
            raise IndexError(f"sample {sample} of {self.directory}: expected 0 to {len(self.table) - 1}.")
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        offset, length, image, image_bytes, label = self.table[sample].item()
        return SampleLocation(shard, offset, length, offset + image, image_bytes, label)

    def describe(self, sample: int) -> str:
        """Shard and key of a sample, for messages: "DIR/train-00003.tar: n01440764/n01440764_10026"."""
        shard = self.shard_path(self.locate(sample).shard)
        try:
            return f"{shard}: {self.key(sample)}"
        except (OSError, tarfile.TarError) as error:
            return f"{shard}: sample {sample}, whose name cannot be read ({error})"

    def key(self, sample: int) -> str:
        """The webdataset key: the name of its members up to the first dot of the file name."""
        where = self.locate(sample)
        names = list(_members(self._read(where)))
        if not names:
            raise tarfile.TarError(f"no tar member at byte {where.offset} of {self.shard_path(where.shard)}")
        return split_member(names[0])[0]

    def read_members(self, sample: int) -> dict[str, bytes]:
        """Every member of a sample by extension, e.g. {"jpg": ..., "cls": ..., "json": ...}.

        It parses the tar; images alone are read faster by `data/stream.py`.
        """
        return {split_member(name)[1]: data for name, data in _members(self._read(self.locate(sample))).items()}

    def _read(self, where: SampleLocation) -> bytes:
        with open(self.shard_path(where.shard), "rb") as file:
            file.seek(where.offset)
            return file.read(where.length)

    def _document(self, table_sha256: str) -> bytes:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "created_with": self.created_with,
            "source": self.source,
            "options": self.options,
            "classes": None if self.classes is None else list(self.classes),
            "samples": len(self.table),
            "bytes": sum(shard.bytes for shard in self.shards),
            "gaps": list(self.gaps),
            "shards": [asdict(shard) for shard in self.shards],
            "table": {"name": TABLE_NAME, "sha256": table_sha256},
        }
        document["sha256"] = _content_sha256(document)
        return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()

    def _check_counts(self, *, expected: int) -> None:
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise _index_damage(self.directory, f"{self.directory}: {INDEX_NAME} names a shard twice")
        if not expected and not len(self.table):
            raise ValueError(f"{self.directory}: the index is empty, it lists no samples. Shard a source that has images.")
        if not expected == len(self.table) == int(self.starts[-1]):
            found = f"{int(self.starts[-1])} in the list of shards, {len(self.table)} rows in the table"
            problem = f"{INDEX_NAME} and {TABLE_NAME} disagree: {expected} samples stated, {found}; they are of different runs"
            raise _index_damage(self.directory, f"{self.directory}: {problem}")

    def _check_rows(self) -> None:
        """Every row lies inside its shard, and every label has a class name."""
        table = self.table
        sizes = np.repeat(np.array([shard.bytes for shard in self.shards], dtype=np.uint64), np.diff(self.starts))
        num_classes = np.iinfo(np.int32).max if self.classes is None else len(self.classes)
        bad = table["offset"] + table["length"] > sizes
        bad |= table["image"].astype(np.uint64) + table["image_bytes"] > table["length"]
        bad |= (table["label"] < NO_LABEL) | (table["label"] >= num_classes)
        if bad.any():
            row = int(bad.argmax())
            shard = self.shards[self.locate(row).shard].name
            problem = f"row {row} ({self.table[row].item()}) does not fit its shard {shard} or the class names"
            raise _index_damage(self.directory, f"{self.directory / TABLE_NAME}: {problem}")

    def _check_files(self) -> None:
        for shard in self.shards:
            path = self.directory / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "it is missing" if size is None else f"it has {size:,} bytes"
                raise DamageError(
                    f"{path}: the index expects this shard with {shard.bytes:,} bytes, but {found}",
                    "Copy it again from where the set was made, or shard the source again.",
                )


def _arguments(index: ShardIndex) -> dict[str, Any]:
    """The constructor's arguments of an index (its cached values left out)."""
    return {name: getattr(index, name) for name in ShardIndex.__dataclass_fields__}


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` complete or not at all: written aside, synced, renamed, and the directory synced."""
    # Machines that share a disk may have equal process ids.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames inside a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def split_member(name: str) -> tuple[str, str]:
    """Key and extension of a tar member, split as webdataset does: at the first dot after the last slash."""
    directory, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return directory + slash + stem, extension.lower()


def _members(block: bytes) -> dict[str, bytes]:
    """Name -> content of the files in a piece of a tar."""
    with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
        files = [member for member in tar if member.isfile()]
        return {member.name: tar.extractfile(member).read() for member in files}  # type: ignore[union-attr]


def _reopen(directory: str) -> ShardIndex:
    return ShardIndex.load(directory, check=False)


def read_document(path: Path) -> dict[str, Any]:
    """The content of index.json, its form and checksum checked.

    Raises:
        ValueError: No set of shards, an unfinished one, or of another format or version.
        DamageError: Lost or damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory of shards. Make it with `python -m data_tools shard folder IMAGES {path}`.")
    file = path / INDEX_NAME
    if not file.is_file():
        raise _no_index(path)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _index_damage(path, f"{file}: not valid JSON ({error})") from error
    _check_content(path, document)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        got = document.get("format") if isinstance(document, dict) else type(document).__name__
        problem = f"{file}: expected the format {FORMAT!r}, got {got!r}"
        if any(path.glob("*.tar")):
            raise _index_damage(path, problem)
        raise ValueError(f"{problem}. Give a directory that `python -m data_tools shard` wrote.")
    if document.get("version") != VERSION:
        raise ValueError(
            f"{file}: version {document.get('version')!r} of the format, this program reads {VERSION}. Update the program."
        )
    missing = [key for key in _REQUIRED if key not in document]
    if missing:
        raise _index_damage(path, f"{file}: the keys {missing} are missing")
    return document


def _no_index(path: Path) -> ValueError:
    problem = f"{path}: no {INDEX_NAME}"
    if (path / NOTES).is_dir():
        return ValueError(f"{problem}, sharding was interrupted. Run the same `python -m data_tools shard` command again.")
    if (path / TABLE_NAME).is_file() or any(path.glob("*.tar")):
        return _index_damage(path, f"{problem}, though there are tars or an {TABLE_NAME}")
    return ValueError(f"{problem} and no tars. Give the directory that `python -m data_tools shard` wrote.")


def _check_content(path: Path, document: Any) -> None:
    """Of an index of any version: it must have the content that it had when it was written."""
    if not isinstance(document, dict) or not document.keys() >= set(_REQUIRED):
        return
    if document.keys() <= _ENTRIES:  # written by an older version
        return
    digest, stated = _content_sha256(document), document.get("sha256")
    if digest != stated:
        raise _index_damage(path, f"{path / INDEX_NAME}: states the sha256 {stated} of its content, which has {digest}")


def _content_sha256(document: dict[str, Any]) -> str:
    """Checksum of all other entries of index.json, whatever the white space between them."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _index_damage(path: Path, problem: str) -> DamageError:
    again = f"Make the index again from the tars with `python -m data_tools verify {path} --repair`"
    return DamageError(problem, f"{again}, or copy it again from where the set was made.")


def _parse_shard(path: Path, entry: Any) -> ShardFile:
    try:
        shard = ShardFile(str(entry["name"]), int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _index_damage(path, f"{path / INDEX_NAME}: {entry!r} does not describe a shard ({error!r})") from error
    if Path(shard.name).name != shard.name or shard.samples < 1:
        problem = f"a shard needs a plain file name and at least one sample, got {entry!r}"
        raise _index_damage(path, f"{path / INDEX_NAME}: {problem}")
    return shard


def _open_table(path: Path, document: dict[str, Any]) -> np.ndarray:
    file = path / TABLE_NAME
    if not file.is_file():
        raise _index_damage(path, f"{file}: missing, though {INDEX_NAME} is there")
    if not document["samples"]:
        raise ValueError(f"{path}: the index is empty, it lists no samples. Shard a source that has images.")
    try:
        table = np.load(file, mmap_mode="r", allow_pickle=False)
    except _TABLE_ERRORS as error:
        raise _index_damage(path, f"{file}: not a numpy table ({error})") from error
    if table.dtype != ROW or table.ndim != 1:
        found = f"{table.dtype} with shape {table.shape}"
        raise _index_damage(path, f"{file}: expected one-dimensional rows of {ROW}, got {found}")
    return table
