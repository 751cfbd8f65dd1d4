"""What of a damaged set can be rebuilt from itself: the index from the tars, and the end of a tar. Samples need the source.

Nothing is written that does not match a checksum, where there is one.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.checksums import hash_file
from data_tools.index_tars import build_index, scan_shards
from simmim_scale.data.shards import INDEX_NAME, TABLE_NAME, DamageError, ShardFile, ShardIndex, atomic_file, read_document

_MOST_ZEROS = 2**16  # bytes of the end of a tar: two empty blocks and the padding to a record


def repair_set(directory: Path, *, jobs: int = 1, progress: Callable[[int], None] | None = None) -> list[str]:
    """Repair a set in place; returns what was done, one sentence each.

    Raises:
        ValueError: No set of shards, or an unfinished one.
        DamageError: The index is lost and the tars do not allow another.
    """
    done = [
        f"{directory / shard.name}: its end was cut off or overwritten, and is restored" for shard in _restore_ends(directory)
    ]
    try:
        ShardIndex.load(directory, check=False).check_table()
    except DamageError as error:
        done.append(f"{_rebuild(directory, jobs, progress)} ({error.problem})")
    return done


def _restore_ends(directory: Path) -> list[ShardFile]:
    """Shards of which only the zeros after the last member were damaged, as their checksum proves after the repair."""
    try:
        document = read_document(directory)
        shards = [ShardFile(**entry) for entry in document["shards"]]
    except (TypeError, ValueError):
        return []
    return [shard for shard in shards if _restore_end(directory / shard.name, shard)]


def _restore_end(path: Path, shard: ShardFile) -> bool:
    if not path.is_file() or abs(path.stat().st_size - shard.bytes) > _MOST_ZEROS or hash_file(path) == shard.sha256:
        return False
    data = path.read_bytes()
    for kept in range(shard.bytes - 1024, max(0, shard.bytes - _MOST_ZEROS), -512):
        if kept <= len(data) and _last_is_file(data, kept):
            whole = data[:kept] + bytes(shard.bytes - kept)
            if hashlib.sha256(whole).hexdigest() == shard.sha256:
                _replace(path, whole)
                return True
    return False


def _last_is_file(data: bytes, end: int) -> bool:
    """Whether something other than zeros stands right before `end`: only there can the last member end."""
    return any(data[max(0, end - 512) : end])


def _replace(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def _rebuild(directory: Path, jobs: int, progress: Callable[[int], None] | None) -> str:
    try:
        document = read_document(directory)
        listed = [ShardFile(**entry) for entry in document["shards"]]
    except (TypeError, DamageError):
        return _rebuild_index(directory, jobs, progress)
    return _rebuild_table(directory, document, listed, jobs, progress)


def _rebuild_table(
    directory: Path, document: dict[str, Any], listed: list[ShardFile], jobs: int, progress: Callable[[int], None] | None
) -> str:
    """index.npy from the tars, if they are as index.json says: a table of damaged tars would hide the damage."""
    paths = [directory / shard.name for shard in listed]
    labels = (document.get("options") or {}).get("labels") if document.get("kind") == "tars" else "auto"
    try:
        found = scan_shards(paths, labels=labels or "auto", jobs=jobs, progress=progress)
    except ValueError as error:
        raise _hopeless(directory, TABLE_NAME, str(error)) from error
    changed = [path for path, shard, stated in zip(paths, found, listed, strict=True) if shard.file != stated]
    if changed:
        raise _hopeless(directory, TABLE_NAME, f"{changed[0]} is not the tar that {INDEX_NAME} lists")
    classes = document.get("classes")
    ShardIndex(
        directory=directory,
        shards=tuple(listed),
        table=np.concatenate([shard.rows for shard in found]),
        classes=None if classes is None else tuple(classes),
        kind=document.get("kind", ""),
        created_with=document.get("created_with", ""),
        source=document.get("source"),
        options=document.get("options") or {},
        gaps=tuple(document.get("gaps") or ()),
    ).write()
    return f"{directory / TABLE_NAME}: made again from the tars, whose checksums are as {INDEX_NAME} states"


def _rebuild_index(directory: Path, jobs: int, progress: Callable[[int], None] | None) -> str:
    """Both files from the tars alone."""
    try:
        build_index(directory, jobs=jobs, overwrite=True, progress=progress)
    except ValueError as error:
        raise _hopeless(directory, INDEX_NAME, str(error)) from error
    return f"{directory / INDEX_NAME}: made again from the tars; source and options of the lost one are not known any more"


def _hopeless(directory: Path, name: str, cause: str) -> DamageError:
    return DamageError(
        f"{directory / name}: lost or damaged, and it cannot be made again from the tars: {cause.rstrip('.')}",
        "Copy the set again from where it was made, or shard the source again into another directory.",
    )
