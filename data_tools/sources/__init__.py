"""Where images come from: each source lists its samples; sharding.py packs any of them.

A source is a function that returns a `Source`. It reads names, labels and annotations only; images are read when they are packed.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim_scale.data.shards import NO_LABEL, split_member

UNKNOWN_SIZE = -1
MOST_LISTED = 20  # pairs of files that one message names


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes somewhere.

    Args:
        place: Path of a file, or a URL.
        size: How many bytes; UNKNOWN_SIZE for what a URL will give.
        offset: First byte of a piece of a larger file, an archive; None: the whole file.
    """

    place: str
    size: int
    offset: int | None = None

    @property
    def is_remote(self) -> bool:
        return "://" in self.place


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One image.

    Args:
        image: Where its bytes are.
        key: Name of its members in the tar, without extension; no dot after the last slash, since webdataset splits there.
        name: Its name in the source, for people.
        label: Class, an index into the source's classes; NO_LABEL: none.
        about: More about it, the text of a JSON object, or nothing; goes to KEY.json.
        companions: Further members: (extension, bytes somewhere), such as a map of classes.
    """

    image: Piece
    key: str
    name: str
    label: int = NO_LABEL
    about: str = ""
    companions: tuple[tuple[str, Piece], ...] = ()


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order, that of their names.

    Args:
        ignored: Number of files that were not looked at.
        notes: What a person should know about it, a sentence each.
        folders: Directories whose files were listed: shards in them would be files of the source.
        largest_map_value: Of companions that are maps of classes (PNG).
    """

    kind: str
    samples: tuple[SourceSample, ...]
    classes: tuple[str, ...] | None
    options: dict[str, Any]
    ignored: int = 0
    notes: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    largest_map_value: int = 255

    def describe(self) -> dict[str, Any]:
        """What the index says about the source: equal for equal files, wherever they lie."""
        digest = hashlib.sha256()
        for sample in self.samples:
            line = f"{sample.key}\0{sample.name}\0{sample.image.size}\0{sample.label}"
            if sample.about or sample.companions:
                line += "\0" + sample.about + "".join(f"\0{name}\0{piece.size}" for name, piece in sample.companions)
            digest.update((line + "\n").encode("utf-8", "backslashreplace"))
        return {
            "files": len(self.samples),
            "bytes": sum(max(0, sample.image.size) for sample in self.samples),
            "listing_sha256": digest.hexdigest(),
        }


def check_keys(samples: Iterable[SourceSample]) -> None:
    """Every key must be usable and occur once.

    Raises:
        ValueError: Samples share a key (the first `MOST_LISTED` pairs are named), or a key could leave the directory that a tar
            is unpacked to.
    """
    seen: dict[str, SourceSample] = {}
    pairs = []
    for sample in samples:
        problem = key_problem(sample.key)
        if problem:
            raise ValueError(f"{sample.image.place}: {sample.key!r} {problem}. Rename {sample.name!r}.")
        other = seen.setdefault(sample.key, sample)
        if other is not sample:
            pairs.append((sample, other))
    if pairs:
        raise ValueError(_collisions(pairs))


def _collisions(pairs: list[tuple[SourceSample, SourceSample]]) -> str:
    listed = [
        f"{sample.image.place} ({sample.name}) and {other.image.place} ({other.name}): both would be the sample {sample.key!r}"
        for sample, other in pairs[:MOST_LISTED]
    ]
    if len(pairs) > MOST_LISTED:
        listed.append(f"and {len(pairs) - MOST_LISTED:,} more")
    rule = "names must differ before the extension (other dots count as '_')"
    if len(pairs) == 1:
        return f"{listed[0]}; {rule}. Rename or remove one of them."
    lines = "\n  ".join(listed)
    return f"{len(pairs):,} pairs of files would be one sample each; {rule}. Rename or remove one of each:\n  {lines}"


def key_problem(key: str) -> str | None:
    """What is wrong with a key, if anything."""
    if not is_safe_name(key):
        return "cannot name a sample in a tar: it could leave the directory that the tar is unpacked to"
    if split_member(f"{key}.x")[0] != key:
        return "cannot name a sample in a tar: at the first dot after the last slash webdataset ends the key"
    return None


def is_safe_name(name: str) -> bool:
    """Whether a tar member of this name stays below the directory it is unpacked to."""
    parts = name.split("/")
    return bool(name) and not name.startswith("/") and not {"", ".", ".."} & set(parts) and "\0" not in name


def key_of(name: str) -> str:
    """The key of a file name with slashes: no extension, other dots as '_'."""
    folder, slash, file = name.rpartition("/")
    stem = file.rpartition(".")[0] or file
    return folder + slash + stem.replace(".", "_")


def read_json(path: Path, *, what: str) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: No such file, or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Give {what}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({error}). Give {what}; download it again if it is cut off.") from error


def check_unique(values: Iterable[Any], *, what: str, path: Path, wanted: str) -> None:
    """Raises ValueError if a value occurs twice in the file at `path`; it is named."""
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{path}: {what} {value!r} is there twice. Give {wanted}.")
        seen.add(value)


def whole_number(value: Any, *, what: str, path: Path) -> int:
    """A value of the file at `path` that must be a whole number.

    Raises:
        ValueError: It is none; `what` says what it should count or name.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or (isinstance(value, float) and number != value):
        raise ValueError(f"{path}: {what}: expected a whole number, got {value!r}. Correct the file or download it again.")
    return number


def local_piece(path: Path, *, named_by: str) -> Piece:
    """A whole local file.

    Raises:
        ValueError: No such file; `named_by` says who promised it.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(
            f"{path}: named by {named_by}, but cannot be looked at ({error.strerror}). Complete the images."
        ) from error
    if not path.is_file():
        raise ValueError(f"{path}: named by {named_by}, but is no file. Complete the images.")
    return Piece(str(path), size)
