"""The ILSVRC2012 development kit: which class each validation image has. Read from the archive as it is, or unpacked."""

import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_SYNSETS = "meta.mat"
_MOST_BYTES = 2**27  # unpacked, of the whole archive; the published one has 5 MB
FIX = "Give ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to, with --devkit."


@dataclass(frozen=True)
class Devkit:
    """Ground truth of the validation images: wnid by number of the image (from 0), and all wnids of classes, sorted."""

    truth: tuple[str, ...]
    wnids: tuple[str, ...]


def read_devkit(path: Path) -> Devkit:
    """Read the development kit (task 1 and 2).

    Raises:
        ValueError: No devkit, damaged, or a ground truth that names unknown classes.
    """
    files = _from_folder(path) if path.is_dir() else _from_archive(path)
    missing = [name for name in (_TRUTH, _SYNSETS) if name not in files]
    if missing:
        raise ValueError(f"{path}: holds no {' and no '.join(missing)}. {FIX}")
    wnids, leaves = _read_synsets(files[_SYNSETS], path)
    try:
        numbers = [int(line) for line in files[_TRUTH].decode("ascii").split()]
        truth = tuple(wnids[number] for number in numbers)
    except (UnicodeDecodeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: {_TRUTH} has a line that is no class number of {_SYNSETS} ({error!r}). {FIX}") from error
    return Devkit(truth, tuple(sorted(leaves)))


def _from_folder(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for name in (_TRUTH, _SYNSETS) for file in sorted(path.rglob(name))[:1]}


def _from_archive(path: Path) -> dict[str, bytes]:
    try:
        with tarfile.open(path, mode="r|*") as tar:  # a stream: nothing is unpacked to disk, nothing is read twice
            return dict(_wanted(tar, path))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as an archive ({error}). {FIX}") from error


def _wanted(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, bytes]]:
    total = 0
    for member in tar:
        total += member.size
        if total > _MOST_BYTES:
            raise ValueError(f"{path}: unpacks to more than {_MOST_BYTES:,} bytes, this is no devkit. {FIX}")
        name = member.name.rpartition("/")[2]
        content: IO[bytes] | None = tar.extractfile(member) if member.isfile() and name in (_TRUTH, _SYNSETS) else None
        if content is not None:
            yield name, content.read()


def _read_synsets(data: bytes, path: Path) -> tuple[dict[int, str], list[str]]:
    """(wnid by ILSVRC2012_ID, wnids without children: the classes)."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError('meta.mat of the devkit is read by scipy. Install it: pip install "simmim-scale[imagenet]".') from error
    try:
        synsets: Any = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_children"])) for row in synsets.reshape(-1)]
    except Exception as error:  # scipy raises nearly anything on damaged files
        raise ValueError(f"{path}: {_SYNSETS} cannot be read ({type(error).__name__}: {error}). {FIX}") from error
    return {number: wnid for number, wnid, _ in rows}, [wnid for _, wnid, children in rows if children == 0]
