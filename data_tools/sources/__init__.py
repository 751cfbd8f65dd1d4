"""Where images come from: each source lists its samples; sharding.py packs any of them.

A source is a function that returns a `Source`. It reads names and labels only; images are read when they are packed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim_scale.data.shards import NO_LABEL, split_member


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One image.

    Args:
        path: File to read.
        key: Name of its members in the tar, without extension; no dot after the last slash, since webdataset splits there.
        name: Its name in the source, for people.
        size: Bytes of the file when it was listed.
        label: Class, an index into the source's classes; NO_LABEL: none.
    """

    path: Path
    key: str
    name: str
    size: int
    label: int = NO_LABEL


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order, that of their names. `ignored` counts files that were not looked at."""

    kind: str
    samples: tuple[SourceSample, ...]
    classes: tuple[str, ...] | None
    options: dict[str, Any]
    ignored: int = 0

    def describe(self) -> dict[str, Any]:
        """What the index says about the source: equal for equal files, wherever they lie."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.key}\0{sample.name}\0{sample.size}\0{sample.label}\n".encode("utf-8", "backslashreplace"))
        return {
            "files": len(self.samples),
            "bytes": sum(sample.size for sample in self.samples),
            "listing_sha256": digest.hexdigest(),
        }


def check_keys(samples: list[SourceSample]) -> None:
    """Every key must be usable and occur once.

    Raises:
        ValueError: Two samples share a key, or a key could leave the directory that a tar is unpacked to.
    """
    seen: dict[str, SourceSample] = {}
    for sample in samples:
        if sample.key.startswith("/") or ".." in sample.key.split("/") or split_member(f"{sample.key}.x")[0] != sample.key:
            raise ValueError(f"{sample.path}: {sample.key!r} cannot name a sample in a tar. Rename the file.")
        other = seen.setdefault(sample.key, sample)
        if other is not sample:
            raise ValueError(
                f"{sample.path} and {other.path}: both would be the sample {sample.key!r}; names must differ before the extension"
                " (other dots count as '_'). Rename or remove one of them."
            )
