"""From a list of samples to a directory of shards: plan -> shards, one job each -> index.

Shard i holds slice i of the shuffled list, so that it depends on nothing but the list, the options and its own images.
A finished shard leaves a note in DST/.shards; the same command goes on from there after an interruption, and whichever of
several tasks finds all notes there writes the index.
"""

import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.checksums import hash_file
from data_tools.destination import REPORT_NAME, State, check_outside, check_same_set, check_space, prepare, remove_leftovers
from data_tools.jobs import run_jobs
from data_tools.locks import open_locked
from data_tools.packing import Finished, LeftOut, pack_shard, read_note
from data_tools.plan import ShardJob, ShardOptions, ShardPlan, Task, make_plan, shard_name
from data_tools.ray_jobs import run_ray_jobs
from data_tools.sources import Source
from simmim_scale import __version__
from simmim_scale.data.shards import INDEX_NAME, NOTES, ShardFile, ShardIndex, atomic_file

CREATED_WITH = f"simmim-scale {__version__}"
ENGINES = ("local", "ray")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_WRITING = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENOENT,  # under a link that leads nowhere
    errno.EEXIST,  # such a link itself
    errno.ELOOP,
    errno.ENAMETOOLONG,
)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class ShardResult:
    """What was made. `written` is False if the same set was there already; `missing` counts shards that other tasks still owe."""

    written: bool
    samples: int
    shards: int
    bytes: int
    left_out: tuple[LeftOut, ...]
    ignored: int
    missing: int = 0


def write_shards(
    source: Source,
    destination: Path,
    options: ShardOptions,
    *,
    jobs: int | None = 1,
    task: Task = Task(),  # noqa: B008 frozen
    engine: str = "local",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ShardResult:
    """Pack `source` into `destination`. Equal source and options give equal bytes for any number of jobs and tasks.

    The index is written last: a directory that has one is complete. An interrupted run is continued by calling this again.

    Args:
        jobs: Processes; with the engine "ray", most jobs at once (None: all cores of the cluster).
        task: The part of the work to do; the last task to finish writes the index.
        engine: "local" or "ray".
        progress: Called with numbers of samples that were seen to.

    Raises:
        ValueError: The destination lies in the source, holds something else or cannot be written, the disk is full, or no
            image of the source can be used.
    """
    if overwrite and task.count > 1:
        raise ValueError("--overwrite: tasks would remove each other's shards. Remove the directory, then start the tasks.")
    check_outside(destination, source.folders)
    facts = _facts(source, options)
    plan = make_plan(source, options, _digest(facts))
    with _refusals_explained(destination):
        if prepare(destination, facts, plan.digest, overwrite=overwrite) is State.COMPLETE:
            return _already_there(destination, source)
        mine = [number for number in range(plan.num_shards) if task.has(number)]
        _check_space(plan, destination, mine)
        run = _runner(engine, jobs)
        for count in run(pack_shard, plan.jobs(destination, mine)):
            if progress:
                progress(count)
        return _finish(plan, destination, facts)


def repair_shards(
    source: Source, destination: Path, options: ShardOptions, *, jobs: int = 1, progress: Progress | None = None
) -> list[str]:
    """Make the damaged and missing shards of a complete set again, from its source; returns their names.

    Raises:
        ValueError: The set is of another source or other options, its index is damaged, or a shard came out differently.
    """
    facts = _facts(source, options)
    check_same_set(destination, facts)
    plan = make_plan(source, options, _digest(facts))
    index = ShardIndex.load(destination, check=False)
    checks = run_jobs(functools.partial(_is_damaged, destination), index.shards, jobs)
    damaged = [shard for shard, bad in zip(index.shards, checks, strict=True) if bad]
    (destination / NOTES).mkdir(exist_ok=True)
    with _refusals_explained(destination):
        for shard in damaged:  # a stale note must not stand for it
            (destination / NOTES / f"{shard.name}.json").unlink(missing_ok=True)
        numbers = [number for number in range(plan.num_shards) if shard_name(number) in {shard.name for shard in damaged}]
        for count in run_jobs(pack_shard, plan.jobs(destination, numbers, again=True), jobs):
            if progress:
                progress(count)
    for shard in damaged:
        done = read_note(destination, shard.name, plan.digest)
        if done is None or done.shard is None or done.shard.file != shard:
            raise ValueError(
                f"{destination / shard.name}: made again, it is not what the index states; the content of the source or the"
                " program has changed. Shard the source anew with --overwrite."
            )
    remove_leftovers(destination)
    return [shard.name for shard in damaged]


def _facts(source: Source, options: ShardOptions) -> dict[str, Any]:
    return {"kind": source.kind, "source": source.describe(), "options": {**source.options, **options.facts()}}


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _is_damaged(destination: Path, shard: ShardFile) -> bool:
    path = destination / shard.name
    return not path.is_file() or path.stat().st_size != shard.bytes or hash_file(path) != shard.sha256


def _already_there(destination: Path, source: Source) -> ShardResult:
    try:
        index = ShardIndex.load(destination)
    except ValueError as error:
        raise ValueError(
            f"{error} To make the damaged shards again from this source, add --repair; to make all anew, --overwrite."
        ) from error
    remove_leftovers(destination)
    return ShardResult(False, len(index), len(index.shards), sum(shard.bytes for shard in index.shards), (), source.ignored)


def _check_space(plan: ShardPlan, destination: Path, shards: list[int]) -> None:
    if plan.options.reencoding:  # sizes are not known
        return
    names = {path.name for path in destination.iterdir()}
    check_space(destination, plan.estimate([number for number in shards if shard_name(number) not in names]))


def _runner(engine: str, jobs: int | None) -> Callable[[Callable[[ShardJob], int], Iterator[ShardJob]], Iterator[int]]:
    if engine not in ENGINES:
        raise ValueError(f"--engine: one of {', '.join(ENGINES)}, got {engine!r}.")
    if engine == "ray":
        return functools.partial(run_ray_jobs, jobs=jobs)
    return functools.partial(run_jobs, jobs=jobs or 1)


def _finish(plan: ShardPlan, destination: Path, facts: dict[str, Any]) -> ShardResult:
    """Write report and index, if all shards are there."""
    with _only_one(destination):
        if (destination / INDEX_NAME).exists():  # another task was faster
            return _already_there(destination, plan.source)
        notes = [read_note(destination, shard_name(number), plan.digest) for number in range(plan.num_shards)]
        finished = [note for note in notes if note is not None]
        result = _result(finished, plan, missing=len(notes) - len(finished))
        if result.missing:
            return result
        _write_report(destination, result, plan)
        if not result.shards:
            first = result.left_out[0]
            raise ValueError(
                f"{destination}: none of the {len(plan.source.samples)} images can be used; {REPORT_NAME} there lists why, the"
                f" first: {first.name}: {first.cause}."
            )
        _write_index(destination, finished, plan.source, facts)
        remove_leftovers(destination)
    return result


def _result(finished: list[Finished], plan: ShardPlan, *, missing: int) -> ShardResult:
    shards = [done.shard for done in finished if done.shard is not None]
    return ShardResult(
        written=True,
        samples=sum(len(shard.rows) for shard in shards),
        shards=len(shards),
        bytes=sum(shard.file.bytes for shard in shards),
        left_out=tuple(item for done in finished for item in done.left_out),
        ignored=plan.source.ignored,
        missing=missing,
    )


def _write_report(destination: Path, result: ShardResult, plan: ShardPlan) -> None:
    document = {
        "listed": len(plan.source.samples),
        "taken": result.samples,
        "ignored_files": result.ignored,
        "left_out": [asdict(item) for item in result.left_out],
    }
    with atomic_file(destination / REPORT_NAME) as file:
        file.write((json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _write_index(destination: Path, finished: list[Finished], source: Source, facts: dict[str, Any]) -> None:
    shards = [done.shard for done in finished if done.shard is not None]
    ShardIndex(
        directory=destination,
        shards=tuple(shard.file for shard in shards),
        table=np.concatenate([shard.rows for shard in shards]),
        classes=source.classes,
        kind=facts["kind"],
        created_with=CREATED_WITH,
        source=facts["source"],
        options=facts["options"],
        gaps=tuple(number for number, done in enumerate(finished) if done.shard is None),
    ).write(destination)


@contextmanager
def _only_one(destination: Path) -> Iterator[None]:
    """Tasks that end at the same time write the index one after another."""
    lock = destination / NOTES / "lock"
    lock.parent.mkdir(exist_ok=True)
    handle = open_locked(lock, patience=600.0)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _refusals_explained(destination: Path) -> Iterator[None]:
    """What the system does not let us write: a message instead of its number."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_WRITING:
            fix = "Give a directory that you may make and write to, or change its permissions"
            raise ValueError(f"{destination}: cannot be written ({error.strerror}). {fix}.") from error
        if error.errno not in _FULL:
            raise
        raise ValueError(
            f"{destination}: the disk is full ({error.strerror}). Finished shards are kept: free some space, then run the same"
            " command again."
        ) from error
