"""Opens a set of shards wherever it is: a directory, or a URL whose index is mirrored and whose shards are cached."""

import fcntl
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim_scale.config.schema import RemoteConfig
from simmim_scale.data.cache import ShardCache
from simmim_scale.data.remote import RemoteDirectory, RemoteError, is_remote
from simmim_scale.data.shards import INDEX_NAME, ShardIndex, atomic_file


@dataclass(frozen=True, eq=False)
class RemoteIndex(ShardIndex):
    """The index of remote shards. `directory` is the local mirror: it has the index, and the shards that are cached."""

    cache: ShardCache | None = None

    def __reduce__(self) -> Any:
        return _reopen, (str(self.directory), self.cache)


def open_index(location: str | os.PathLike[str], remote: RemoteConfig) -> ShardIndex:
    """The index of a directory of shards, or of a URL.

    Args:
        location: A path, or a URL such as s3://bucket/train, gs://..., https://..., hf://datasets/....
        remote: Where and how much to cache, and how patiently to read.

    Raises:
        ValueError: Anything missing, foreign or damaged: which file, and what to do.
    """
    if not is_remote(str(location)):
        return ShardIndex.load(Path(location))
    source = RemoteDirectory(str(location), remote)
    try:
        document = source.read(INDEX_NAME)
        root = Path(remote.cache_dir).expanduser()
        directory = _mirror(source, document, root)
    except (OSError, RemoteError) as error:
        raise ValueError(
            f"{location}: the index of the shards cannot be read ({type(error).__name__}: {error})."
            f" Check the URL, the rights, and that {INDEX_NAME} lies there; copy the directory that `python -m data_tools shard`"
            " wrote as a whole."
        ) from error
    index = ShardIndex.load(directory, check=False)
    cache = ShardCache(source, index.shards, directory=directory, root=root, limit=int(remote.cache_gb * 1e9))
    return _with_cache(index, cache)


def _mirror(source: RemoteDirectory, document: bytes, root: Path) -> Path:
    """The directory that has the same index files as the remote one. Another index there means another directory here."""
    digest = hashlib.sha256(source.url.encode() + b"\0" + document).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.url.rsplit("/", 1)[-1])[:40] or "shards"
    directory = root / f"{name}-{digest[:16]}"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".index.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / INDEX_NAME).exists():
            return directory
        for entry in _index_files(source, document):
            with atomic_file(directory / entry["name"]) as file:
                file.write(source.read(entry["name"], sha256=entry["sha256"]))
        with atomic_file(directory / INDEX_NAME) as file:
            file.write(document)
    return directory


def _index_files(source: RemoteDirectory, document: bytes) -> list[dict[str, str]]:
    """The files that belong to an index besides index.json: its entries that have a name and a checksum."""
    try:
        content = json.loads(document)
        entries = [value for value in content.values() if isinstance(value, dict) and {"name", "sha256"} <= value.keys()]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{source.url}/{INDEX_NAME}: not an index of shards ({error}). Check the URL.") from error
    for entry in entries:
        if Path(entry["name"]).name != entry["name"]:
            raise ValueError(f"{source.url}/{INDEX_NAME}: {entry['name']!r} is no plain file name. The index is damaged.")
    return entries


def _with_cache(index: ShardIndex, cache: ShardCache | None) -> RemoteIndex:
    fields = {name: getattr(index, name) for name in ShardIndex.__dataclass_fields__}
    return RemoteIndex(**fields, cache=cache)


def _reopen(directory: str, cache: ShardCache) -> RemoteIndex:
    return _with_cache(ShardIndex.load(directory, check=False), cache)
