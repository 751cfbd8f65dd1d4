"""Is a directory of shards what its index says? Finds a single changed byte, and names the sample it is in."""

import functools
import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data_tools.checksums import hash_file
from data_tools.images import ImageError, check_image
from data_tools.index_tars import KIND
from data_tools.jobs import run_jobs
from simmim_scale.data.shards import NO_LABEL, DamageError, SampleLocation, ShardIndex, split_member

_MOST_PER_SHARD = 20  # problems told about one shard; where one byte moved, every later sample is wrong
_NUMBERED = re.compile(r"(.*?)(\d+)(\.tar)")


@dataclass(frozen=True)
class _Check:
    """What was found in one shard: problems, and 8-byte digests of the keys."""

    problems: list[str]
    keys: np.ndarray


def load_index(directory: Path) -> ShardIndex:
    """The index, its own damage checked, but not yet the shards.

    Raises:
        ValueError: No index. DamageError: one that is lost or damaged.
    """
    return ShardIndex.load(directory, check=False)


def verify_shards(
    index: ShardIndex, *, decode: bool = True, jobs: int = 1, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Problems, one sentence each; empty if all is well. What one shard has does not keep the others from being looked at.

    Checked: the index itself, that each shard is there with its size and sha256, that no other tar lies beside them, that
    their numbers leave no gap, that each row points at an image inside one sample with one key and the right label, that no
    key occurs twice, and (with `decode`, unless broken images were kept on purpose) that it decodes.
    """
    problems = _unlisted(index) + _gaps(index)
    try:
        index.check_table()
    except DamageError as error:
        problems.append(error.problem)
    decode = decode and index.options.get("undecodable") != "keep"
    keys = []
    for number, found in enumerate(
        run_jobs(functools.partial(_verify_shard, index.directory, decode), range(len(index.shards)), jobs)
    ):
        problems += found.problems
        keys.append(found.keys)
        if progress:
            progress(index.shards[number].samples)
    return problems + _duplicates(index, keys)


def _unlisted(index: ShardIndex) -> list[str]:
    if index.kind == KIND:  # the user's pattern chose among the tars
        return []
    known = {shard.name for shard in index.shards}
    return [f"{path}: not listed in the index" for path in sorted(index.directory.glob("*.tar")) if path.name not in known]


def _gaps(index: ShardIndex) -> list[str]:
    """Numbers missing in each series of shard names; our own series start at 0."""
    series: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, (_NUMBERED.fullmatch(shard.name) for shard in index.shards)):
        series.setdefault((match[1], f"0{len(match[2])}d"), set()).add(int(match[2]))
    problems = []
    for (prefix, digits), numbers in series.items():
        first = min(numbers) if index.kind == KIND else 0
        missing = sorted(set(range(first, max(numbers))) - numbers - set(index.gaps))
        if missing:
            names = ", ".join(f"{prefix}{number:{digits}}.tar" for number in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            problems.append(f"{index.directory}: the numbering of the shards has a gap: the index lists no {names}{more}")
    return problems


def _duplicates(index: ShardIndex, keys: list[np.ndarray]) -> list[str]:
    every = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    _, first, counts = np.unique(every[every != 0], return_index=True, return_counts=True)
    twice = first[counts > 1]
    if not len(twice) or len(every) != len(index):
        return []
    return [f"{index.describe(int(row))}: this key occurs more than once" for row in twice[:_MOST_PER_SHARD]]


def _verify_shard(directory: Path, decode: bool, number: int) -> _Check:
    index = ShardIndex.load(directory, check=False)
    path, expected = index.shard_path(number), index.shards[number]
    try:
        problem = _check_size(path, expected.bytes)
        if problem is None:
            return _check_content(index, number, decode=decode)
    except OSError as error:
        problem = f"{path}: cannot be read ({error.strerror or error}); its samples were not looked at"
    return _Check([problem], np.zeros(expected.samples, np.uint64))


def _check_size(path: Path, expected: int) -> str | None:
    if path.is_dir():
        return f"{path}: expected a tar of {expected:,} bytes, it is a directory"
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        return f"{path}: expected {expected:,} bytes, {'it is missing' if size is None else f'it has {size:,}'}"
    return None


def _check_content(index: ShardIndex, number: int, *, decode: bool) -> _Check:
    path, expected = index.shard_path(number), index.shards[number]
    keys = np.zeros(expected.samples, np.uint64)
    problems = []
    digest = hash_file(path)
    if digest != expected.sha256:
        problems.append(f"{path}: expected sha256 {expected.sha256}, got {digest}")
    end, first = 0, int(index.starts[number])
    with open(path, "rb") as file:
        for sample in range(first, int(index.starts[number + 1])):
            where = index.locate(sample)
            file.seek(where.offset)
            block = file.read(where.length)
            problem = _check_place(where, end, ours=index.kind != KIND)
            end = where.offset + where.length
            keys[sample - first], wrong = _check_sample(block, where, index, decode=decode)
            if problem or wrong:
                problems.append(f"{path}: sample {sample}: {problem or wrong}")
            if len(problems) >= _MOST_PER_SHARD:
                return _Check([*problems, f"{path}: further problems are not listed"], keys)
    return _Check(problems, keys)


def _check_place(where: SampleLocation, end: int, *, ours: bool) -> str | None:
    """Our own samples follow each other without a gap; others may have anything between."""
    if where.offset == end or (where.offset > end and not ours):
        return None
    return f"starts at byte {where.offset}, the one before ends at {end}"


def _check_sample(block: bytes, where: SampleLocation, index: ShardIndex, *, decode: bool) -> tuple[int, str | None]:
    """Digest of the key (0: none) and what is wrong with the members of one sample, or None."""
    try:
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
            members = [member for member in tar.getmembers() if member.isfile()]
            contents = {split_member(member.name)[1]: _content(tar, member) for member in members}
    except (tarfile.TarError, OSError, ValueError) as error:
        return 0, f"no members of a tar ({error})"
    keys = sorted({split_member(member.name)[0] for member in members})
    if len(keys) != 1:
        return 0, f"expected members of one sample, got those of {keys}"
    digest = int.from_bytes(blake2b(keys[0].encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
    problem = _check_members(block, members, contents, where, index, decode=decode)
    return digest, problem and f"{keys[0]}: {problem}"


def _check_members(
    block: bytes,
    members: list[tarfile.TarInfo],
    contents: dict[str, bytes],
    where: SampleLocation,
    index: ShardIndex,
    *,
    decode: bool,
) -> str | None:
    start = where.image_offset - where.offset
    if not any(member.offset_data == start and member.size == where.image_bytes for member in members):
        return f"no member of {where.image_bytes} bytes where the index has the image"
    label = contents.get("cls")
    expected = b"" if where.label == NO_LABEL else str(where.label).encode()
    if index.options.get("labels") != "none" and (label or b"").strip() != expected:
        return f"expected the label {where.label}, got {label!r}"
    if decode:
        try:
            check_image(block[start : start + where.image_bytes])
        except ImageError as error:
            return str(error)
    return None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
