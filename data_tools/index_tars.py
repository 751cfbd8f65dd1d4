"""An index for tars made elsewhere, or a lost one made again: every tar is read, nothing of it is changed."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.checksums import hash_file
from data_tools.jobs import run_jobs
from data_tools.sources import is_safe_name
from data_tools.tarscan import ArchiveError, Kind, TarMember, scan_tar
from simmim_scale import __version__
from simmim_scale.data.shards import INDEX_NAME, NO_LABEL, ROW, ShardFile, ShardIndex, split_member

KIND = "tars"
LABELS = ("auto", "none")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "npy", "bmp", "gif", "ppm", "pgm")
_LARGEST_COMPANION = 2**24  # bytes of KEY.cls and KEY.json that are read


@dataclass(frozen=True)
class ScannedShard:
    """A tar as it is found: `keys` are 8-byte digests of the samples' keys, `names` the classes that KEY.json names."""

    file: ShardFile
    rows: np.ndarray
    keys: np.ndarray
    names: dict[int, str]


def build_index(
    directory: Path,
    *,
    pattern: str = "*.tar",
    labels: str = "auto",
    classes: Path | None = None,
    jobs: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ShardIndex:
    """Write index.json and index.npy for the tars in a directory.

    Args:
        pattern: Which files of the directory, in the order of their names.
        labels: "auto": from KEY.cls (whole numbers from 0), where there is one; "none".
        classes: A text file with a class name a line; None: from KEY.json of our own shards, else the numbers.
        progress: Called with the number of tars done.

    Raises:
        ValueError: No tars, damaged ones, an index already there, keys that occur twice, unsafe names, samples without image.
    """
    if labels not in LABELS:
        raise ValueError(f"--labels: one of {', '.join(LABELS)}, got {labels!r}.")
    if (directory / INDEX_NAME).exists() and not overwrite:
        raise ValueError(f"{directory}: has an {INDEX_NAME} already. Check it with `data_tools verify`, or add --overwrite.")
    paths = find_tars(directory, pattern)
    names = None if classes is None else _read_names(classes)
    shards = scan_shards(paths, labels=labels, jobs=jobs, progress=progress)
    index = ShardIndex(
        directory=directory,
        shards=tuple(shard.file for shard in shards),
        table=np.concatenate([shard.rows for shard in shards]),
        classes=_class_names(shards, classes, names),
        kind=KIND,
        created_with=f"simmim-scale {__version__}",
        source={"pattern": pattern},
        options={"labels": labels},
    )
    index.write()
    return index


def find_tars(directory: Path, pattern: str) -> list[Path]:
    """The files of a directory whose names fit a pattern, in the order of their names.

    Raises:
        ValueError: None, one that is no file, or a pattern of more than a name.
    """
    if not pattern or "/" in pattern or pattern == "**":
        raise ValueError(
            f"--pattern: a pattern of file names such as 'train-*.tar', got {pattern!r}. An index is of tars that lie in the"
            " directory itself: give each directory of tars its own, or link the tars into one."
        )
    paths = sorted(directory.glob(pattern))
    if not paths:
        raise ValueError(f"{directory}: no files {pattern}. Give the directory that holds the tars, or their --pattern.")
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"{path}: is {_what_else(path)}, expected a tar. Remove it, or choose among the files with --pattern."
            )
    return paths


def _what_else(path: Path) -> str:
    if path.is_dir():
        return "a directory"
    return f"a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "no plain file"


def scan_shards(
    paths: list[Path], *, labels: str = "auto", jobs: int = 1, progress: Callable[[int], None] | None = None
) -> list[ScannedShard]:
    """What the tars hold, in their order.

    Raises:
        ValueError: See `build_index`.
    """
    shards = []
    for shard in run_jobs(functools.partial(scan_shard, labels=labels), paths, jobs):
        shards.append(shard)
        if progress:
            progress(1)
    check_duplicates(shards)
    return shards


def check_duplicates(shards: list[ScannedShard]) -> None:
    """Raises ValueError if two samples of the set have one key."""
    keys = np.concatenate([shard.keys for shard in shards])
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(twice):
        starts = np.cumsum([0] + [len(shard.keys) for shard in shards])
        pair = sorted(int(row) for row in order[twice[0] : twice[0] + 2])
        names = [shards[int(np.searchsorted(starts, row, side="right")) - 1].file.name for row in pair]
        raise ValueError(
            f"{names[0]} and {names[1]}: samples {pair[0]} and {pair[1]} of the set have the same key. Whoever reads by key would"
            " lose one: rename the members of one of them."
        )


def scan_shard(path: Path, *, labels: str = "auto") -> ScannedShard:
    """Rows, keys and checksum of one tar.

    Raises:
        ArchiveError: See `build_index`.
    """
    try:
        return _scan(path, labels)
    except OSError as error:
        raise ArchiveError(
            f"{path}: cannot be read ({error.strerror}). Repair the disk or the rights, or copy it again."
        ) from error


def _scan(path: Path, labels: str) -> ScannedShard:
    rows, keys, names = [], [], dict[int, str]()
    with open(path, "rb") as file:
        for key, members in _samples(path):
            label, name = _label(file.fileno(), path, key, members) if labels == "auto" else (NO_LABEL, None)
            if name is not None:
                names[label] = name
            rows.append(_row(path, key, members, label))
            keys.append(int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"))
    if not rows:
        raise ArchiveError(f"{path}: holds no samples. Leave it out with --pattern, or remove it.")
    shard = ShardFile(path.name, len(rows), path.stat().st_size, hash_file(path))
    return ScannedShard(shard, np.array(rows, dtype=ROW), np.array(keys, dtype=np.uint64), names)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """(key, members by extension) of each sample of a tar."""
    members: dict[str, TarMember] = {}
    current, seen = None, set[str]()
    for member in scan_tar(path):
        if member.kind is Kind.DIRECTORY:
            continue
        name = member.name.removeprefix("./")
        if member.kind is not Kind.FILE or not is_safe_name(name):
            what = "is a " + member.kind.value if member.kind is not Kind.FILE else "would leave the directory it is unpacked to"
            raise ArchiveError(f"{path}: {member.name!r} {what}. Only plain files can be samples: make the tar without it.")
        key, extension = split_member(member.name)
        if key.startswith("__"):  # notes of tar writers; webdataset skips them too
            continue
        if key != current and members:
            yield str(current), members
            members = {}
        if extension in members or (key != current and key in seen):
            raise ArchiveError(
                f"{path}: the key {key!r} is there twice, or its members do not stand together. Write the tar anew."
            )
        current = key
        seen.add(key)
        members[extension] = member
    if members:
        yield str(current), members


def _row(path: Path, key: str, members: dict[str, TarMember], label: int) -> tuple[int, int, int, int, int]:
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if image is None:
        raise ArchiveError(
            f"{path}: the sample {key!r} has no image, only {_extensions(members)}. Known are {', '.join(IMAGE_EXTENSIONS)}: make"
            " the tar without it, or give its image one of these extensions."
        )
    start, end = min(m.header for m in members.values()), max(m.end for m in members.values())
    if end - start >= 2**32:
        raise ArchiveError(f"{path}: the sample {key!r} has {end - start:,} bytes; up to {2**32 - 1:,} can be indexed.")
    return start, end - start, image.data - start, image.size, label


def _extensions(members: dict[str, TarMember]) -> str:
    return ", ".join(extension or "a file without extension" for extension in sorted(members))


def _label(handle: int, path: Path, key: str, members: dict[str, TarMember]) -> tuple[int, str | None]:
    """(label, name of its class if KEY.json gives it)."""
    content = {name: _small(handle, members.get(name)) for name in ("cls", "json")}
    if content["cls"] is None:
        return NO_LABEL, None
    text = content["cls"].strip()
    if not (text.isdigit() and len(text) < 10):
        raise ArchiveError(
            f"{path}: the label of the sample {key!r} (its member .cls) is {text[:40].decode('utf-8', 'backslashreplace')!r},"
            " expected a whole number from 0. Write such numbers, or add --labels none to leave labels out."
        )
    about = _parse(content["json"])
    name = about.get("class") if about.get("label") == int(text) else None
    return int(text), name if isinstance(name, str) else None


def _small(handle: int, member: TarMember | None) -> bytes | None:
    if member is None or member.size > _LARGEST_COMPANION:
        return None
    return os.pread(handle, member.size, member.data)


def _parse(content: bytes | None) -> dict[str, Any]:
    try:
        document = json.loads(content or b"{}")
    except (UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return document if isinstance(document, dict) else {}


def _read_names(file: Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else f"no UTF-8, {error.reason} at byte {error.start}"
        raise ValueError(f"--classes: {file} cannot be read ({cause}). Give a text file with a class name a line.") from error


def _class_names(shards: list[ScannedShard], file: Path | None, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    largest = max(int(shard.rows["label"].max()) for shard in shards)
    if names is not None:
        if len(names) <= largest:
            raise ValueError(f"{file}: has {len(names)} class names, but the largest label is {largest}. Add the missing lines.")
        return names
    if largest == NO_LABEL:
        return None
    known = {label: name for shard in shards for label, name in shard.names.items()}
    return tuple(known.get(label, str(label)) for label in range(largest + 1))
