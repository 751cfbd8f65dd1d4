"""From a list of samples to a directory of shards: plan -> shards, one job each -> index.

Shard i holds slice i of the shuffled list, so that it depends on nothing but the list, the options and its own images.
A finished shard leaves a note in DST/.shards; the same command goes on from there after an interruption.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.images import CHECKS, ImageError, check_image
from data_tools.jobs import run_jobs
from data_tools.sources import Source, SourceSample
from data_tools.tarwriter import Shard, ShardWriter
from simmim_scale import __version__
from simmim_scale.data.shards import FORMAT, INDEX_NAME, NO_LABEL, ROW, TABLE_NAME, ShardFile, ShardIndex, atomic_file

REPORT_NAME = "report.json"
CREATED_WITH = f"simmim-scale {__version__}"
_NOTES = ".shards"


@dataclass(frozen=True)
class ShardOptions:
    """What determines the bytes of the shards, besides the source.

    Args:
        samples_per_shard: Images a shard (fewer where some were left out, and in the last).
        shuffle: Mix all images once, by `seed`; else keep the order of their names.
        seed: Seed of the shuffle.
        check: How images are checked before they are taken, see `images.check_image`.
    """

    samples_per_shard: int = 1000
    shuffle: bool = True
    seed: int = 0
    check: str = "full"

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard: at least 1, got {self.samples_per_shard}. 1000 is a good value.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed: 0 to {2**32 - 1}, got {self.seed}.")
        if self.check not in CHECKS:
            raise ValueError(f"--check: one of {', '.join(CHECKS)}, got {self.check!r}.")


@dataclass(frozen=True)
class LeftOut:
    """An image that was not taken, and why."""

    name: str
    cause: str


@dataclass(frozen=True)
class ShardResult:
    """What was made. `written` is False if the same set was there already."""

    written: bool
    samples: int
    shards: int
    bytes: int
    left_out: tuple[LeftOut, ...]
    ignored: int


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: everything a process needs to know."""

    directory: Path
    number: int
    plan: str  # digest of source and options: a note of another plan is not ours
    check: str
    samples: tuple[SourceSample, ...]
    classes: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}.tar"


@dataclass(frozen=True)
class _Finished:
    shard: Shard | None  # None: no image of its slice could be used
    left_out: tuple[LeftOut, ...]
    listed: int


def write_shards(
    source: Source,
    destination: Path,
    options: ShardOptions,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ShardResult:
    """Pack `source` into `destination`. Equal source and options give equal bytes for any number of jobs.

    The index is written last: a directory that has one is complete. An interrupted run is continued by calling this again.

    Raises:
        ValueError: The destination holds something else, or no image of the source can be used.
    """
    facts = {"kind": source.kind, "source": source.describe(), "options": {**source.options, **asdict(options)}}
    plan = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if _prepare(destination, facts, plan, overwrite=overwrite):
        index = ShardIndex.load(destination)
        return ShardResult(False, len(index), len(index.shards), sum(shard.bytes for shard in index.shards), (), source.ignored)
    finished = []
    for done in run_jobs(_write_shard, _plan_jobs(source, destination, options, plan), jobs):
        finished.append(done)
        if progress:
            progress(done.listed)
    left_out = tuple(item for done in finished for item in done.left_out)
    shards = [done.shard for done in finished if done.shard is not None]
    _write_report(destination, left_out, source)
    if not shards:
        raise ValueError(
            f"{destination}: none of the {len(source.samples)} images can be used; {REPORT_NAME} there lists why, the first:"
            f" {left_out[0].name}: {left_out[0].cause}."
        )
    _write_index(destination, shards, source, facts)
    shutil.rmtree(destination / _NOTES)
    return ShardResult(
        True,
        sum(len(shard.rows) for shard in shards),
        len(shards),
        sum(shard.file.bytes for shard in shards),
        left_out,
        source.ignored,
    )


def _prepare(destination: Path, facts: dict[str, Any], plan: str, *, overwrite: bool) -> bool:
    """Make the destination ready; True if the set is there already and complete."""
    _check_foreign(destination)
    note = destination / _NOTES / "plan"
    if (destination / INDEX_NAME).exists():
        if not overwrite:
            _check_same_set(destination, facts)
            return True
    elif note.is_file():
        if note.read_text(encoding="utf-8") == plan:
            return False
        if not overwrite:
            raise ValueError(
                f"{destination}: holds an unfinished set of another source or with other options. Run the command that began it"
                " again, choose another directory, or add --overwrite."
            )
    _remove_set(destination)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(plan, encoding="utf-8")
    return False


def _check_same_set(destination: Path, facts: dict[str, Any]) -> None:
    """The complete set at the destination must be the one asked for, and whole."""
    index = ShardIndex.load(destination, check=False)
    found = {"kind": index.kind, "source": index.source, "options": index.options}
    differing = [name for name, value in facts.items() if found[name] != value]
    if differing:
        got = json.dumps({name: found[name] for name in differing})
        raise ValueError(
            f"{destination}: holds shards whose {' and '.join(differing)} differ, {got}. Choose another directory or"
            " add --overwrite."
        )
    try:
        ShardIndex.load(destination)
    except ValueError as error:
        raise ValueError(f"{error} To make the set anew from this source, add --overwrite.") from error


def _own_files(destination: Path) -> Iterator[Path]:
    for pattern in (
        "shard-*.tar",
        ".shard-*.tar.part",
        INDEX_NAME,
        TABLE_NAME,
        REPORT_NAME,
        f".{INDEX_NAME}.*.part",
        f".{TABLE_NAME}.*.part",
    ):
        yield from destination.glob(pattern)


def _check_foreign(destination: Path) -> None:
    """Refuse a destination with anything that this program did not write."""
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination}: is a file. Give a directory for the shards.")
    if not destination.is_dir():
        return
    ours = (destination / _NOTES).is_dir() or _is_own_index(destination / INDEX_NAME)
    own = {path.name for path in _own_files(destination)} if ours else set()
    foreign = sorted(path.name for path in destination.iterdir() if path.name != _NOTES and path.name not in own)
    if foreign:
        raise ValueError(
            f"{destination}: holds other files, such as {foreign[0]}. Choose an empty or new directory for the shards."
        )


def _is_own_index(path: Path) -> bool:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT


def _remove_set(destination: Path) -> None:
    """Remove what an earlier run wrote, the index first, so that no incomplete set ever looks complete."""
    (destination / INDEX_NAME).unlink(missing_ok=True)
    for path in list(_own_files(destination)):
        path.unlink()
    shutil.rmtree(destination / _NOTES, ignore_errors=True)


def _plan_jobs(source: Source, destination: Path, options: ShardOptions, plan: str) -> Iterator[ShardJob]:
    order = (
        np.random.default_rng(options.seed).permutation(len(source.samples))
        if options.shuffle
        else np.arange(len(source.samples))
    )
    for number, start in enumerate(range(0, len(order), options.samples_per_shard)):
        samples = tuple(source.samples[index] for index in order[start : start + options.samples_per_shard])
        yield ShardJob(destination, number, plan, options.check, samples, source.classes)


def _write_shard(job: ShardJob) -> _Finished:
    """Write the shard of a job, or take it over from a run that was interrupted after it."""
    note = job.directory / _NOTES / f"{job.name}.json"
    found = _read_note(note, job)
    if found is not None:
        return found
    left_out: list[LeftOut] = []
    with ShardWriter(job.directory / job.name) as writer:
        for sample in job.samples:
            try:
                _add(writer, sample, job)
            except ImageError as error:
                left_out.append(LeftOut(sample.name, str(error)))
        shard = writer.finish() if len(writer) else None
    with atomic_file(note) as file:
        document = {
            "plan": job.plan,
            "file": asdict(shard.file) if shard else None,
            "rows": shard.rows.tolist() if shard else [],
            "left_out": [asdict(item) for item in left_out],
        }
        file.write(json.dumps(document).encode())
    return _Finished(shard, tuple(left_out), len(job.samples))


def _read_note(note: Path, job: ShardJob) -> _Finished | None:
    """What an earlier run of the same plan says about this shard, if its file is there with the stated size."""
    if not note.is_file():
        return None
    document = json.loads(note.read_text(encoding="utf-8"))
    path = job.directory / job.name
    if document["plan"] != job.plan or (
        document["file"] and not (path.is_file() and path.stat().st_size == document["file"]["bytes"])
    ):
        return None
    rows = np.array([tuple(row) for row in document["rows"]], dtype=ROW)
    shard = Shard(ShardFile(**document["file"]), rows) if document["file"] else None
    return _Finished(shard, tuple(LeftOut(**item) for item in document["left_out"]), len(job.samples))


def _add(writer: ShardWriter, sample: SourceSample, job: ShardJob) -> None:
    try:
        image = sample.path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{sample.path}: cannot be read ({error.strerror}). Repair or remove the file, then run the same command again."
        ) from error
    if len(image) != sample.size:
        raise ValueError(
            f"{sample.path}: has {len(image)} bytes, but had {sample.size} when the source was listed. Let nothing change the"
            " source while it is packed, then run the same command again with --overwrite."
        )
    extension = check_image(image, job.check)
    about: dict[str, Any] = {"name": sample.name}
    companions: dict[str, bytes] = {}
    if sample.label != NO_LABEL:
        assert job.classes is not None
        about |= {"label": sample.label, "class": job.classes[sample.label]}
        companions["cls"] = str(sample.label).encode()
    companions["json"] = json.dumps(about, ensure_ascii=False).encode()
    writer.add(sample.key, image, extension, companions, sample.label)


def _write_report(destination: Path, left_out: tuple[LeftOut, ...], source: Source) -> None:
    document = {
        "listed": len(source.samples),
        "taken": len(source.samples) - len(left_out),
        "ignored_files": source.ignored,
        "left_out": [asdict(item) for item in left_out],
    }
    with atomic_file(destination / REPORT_NAME) as file:
        file.write((json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _write_index(destination: Path, shards: list[Shard], source: Source, facts: dict[str, Any]) -> None:
    ShardIndex(
        directory=destination,
        shards=tuple(shard.file for shard in shards),
        table=np.concatenate([shard.rows for shard in shards]),
        classes=source.classes,
        kind=facts["kind"],
        created_with=CREATED_WITH,
        source=facts["source"],
        options=facts["options"],
    ).write(destination)
