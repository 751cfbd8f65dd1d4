"""Is a directory of shards what its index says? Finds a single changed byte, and names the sample it is in."""

import functools
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from data_tools.checksums import hash_file
from data_tools.images import ImageError, check_image
from data_tools.jobs import run_jobs
from simmim_scale.data.shards import NO_LABEL, SampleLocation, ShardIndex, split_member

_MOST_PER_SHARD = 20  # problems told about one shard; where one byte moved, every later sample is wrong


def load_index(directory: Path) -> ShardIndex:
    """The index, its own damage checked, but not yet the shards.

    Raises:
        ValueError: No index, or one that is damaged.
    """
    return ShardIndex.load(directory, check=False)


def verify_shards(
    index: ShardIndex, *, decode: bool = True, jobs: int = 1, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Problems, one sentence each; empty if all is well.

    Checked: the index itself, that each shard is there with its size and sha256, that no other tar lies beside them, that
    each row points at an image inside one sample with one key and the right label, and (with `decode`) that it decodes.
    """
    problems = _unlisted(index)
    try:
        ShardIndex.load(index.directory)
    except ValueError as error:
        problems.append(str(error))
    checks = run_jobs(functools.partial(_verify_shard, index.directory, decode), range(len(index.shards)), jobs)
    for number, found in enumerate(checks):
        problems += [problem for problem in found if problem not in problems]
        if progress:
            progress(index.shards[number].samples)
    return problems


def _unlisted(index: ShardIndex) -> list[str]:
    known = {shard.name for shard in index.shards}
    return [f"{path}: not listed in the index" for path in sorted(index.directory.glob("*.tar")) if path.name not in known]


def _verify_shard(directory: Path, decode: bool, number: int) -> list[str]:
    index = ShardIndex.load(directory, check=False)
    path, expected = index.shard_path(number), index.shards[number]
    if not path.is_file() or path.stat().st_size != expected.bytes:
        size = f"it has {path.stat().st_size:,}" if path.is_file() else "it is missing"
        return [f"{path}: expected {expected.bytes:,} bytes, {size}"]
    problems = []
    digest = hash_file(path)
    if digest != expected.sha256:
        problems.append(f"{path}: expected sha256 {expected.sha256}, got {digest}")
    end = 0
    with open(path, "rb") as file:
        for sample in range(int(index.starts[number]), int(index.starts[number + 1])):
            where = index.locate(sample)
            file.seek(where.offset)
            problem = None if where.offset == end else f"starts at byte {where.offset}, the one before ends at {end}"
            end = where.offset + where.length
            problem = problem or _check_sample(file.read(where.length), where, index.classes, decode=decode)
            if problem:
                problems.append(f"{path}: sample {sample}: {problem}")
            if len(problems) >= _MOST_PER_SHARD:
                return [*problems, f"{path}: further problems are not listed"]
    return problems


def _check_sample(block: bytes, where: SampleLocation, classes: tuple[str, ...] | None, *, decode: bool) -> str | None:
    """What is wrong with the members of one sample, or None."""
    try:
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
            members = tar.getmembers()
            contents = {split_member(member.name)[1]: _content(tar, member) for member in members}
    except (tarfile.TarError, OSError, ValueError) as error:
        return f"no members of a tar ({error})"
    keys = sorted({split_member(member.name)[0] for member in members})
    if len(keys) != 1:
        return f"expected members of one sample, got those of {keys}"
    here = f"{keys[0]}: "
    start = where.image_offset - where.offset
    if not any(member.offset_data == start and member.size == where.image_bytes for member in members):
        return here + f"no member of {where.image_bytes} bytes where the index has the image"
    label = contents.get("cls")
    if (b"" if label is None else label) != (b"" if where.label == NO_LABEL else str(where.label).encode()):
        return here + f"expected the label {where.label}, got {label!r}"
    if decode:
        try:
            check_image(block[start : start + where.image_bytes])
        except ImageError as error:
            return here + str(error)
    return None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
