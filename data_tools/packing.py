"""Writing one shard: read, check, perhaps encode anew, append. What was done is left in a note, so that it is done once."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import is_array
from data_tools.contents import PieceReader
from data_tools.download import UnreachableError
from data_tools.images import ImageError, ImageFacts, check_image, check_map, sniff
from data_tools.plan import ShardJob
from data_tools.reencode import reencode, resize_map
from data_tools.sources import SourceSample
from data_tools.tarwriter import Shard, ShardWriter
from simmim_scale.data.shards import INDEX_NAME, NO_LABEL, NOTES, ROW, ShardFile, atomic_file, split_member


@dataclass(frozen=True)
class LeftOut:
    """An image that does not decode or could not be had, and why; `kept`: it is in the shard all the same."""

    name: str
    cause: str
    kept: bool = False


@dataclass(frozen=True)
class Finished:
    """A slice of the samples that was packed. `shard` is None if none of them could be used."""

    shard: Shard | None
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class _Packed:
    """The members of a sample, ready to be written."""

    image: bytes
    extension: str
    companions: dict[str, bytes]


def note_path(directory: Path, name: str) -> Path:
    return directory / NOTES / f"{name}.json"


def pack_shard(job: ShardJob) -> int:
    """Write the shard of a job, unless a run that was interrupted after it has; returns how many samples were seen to."""
    if read_note(job.directory, job.name, job.plan) is not None:
        return len(job.samples)
    with ShardWriter(job.directory / job.name) as writer, PieceReader() as reader:
        if not _was_done_meanwhile(job):
            _write_shard(writer, reader, job)
    return len(job.samples)


def _was_done_meanwhile(job: ShardJob) -> bool:
    """Whether a process that was given the same shard has finished it while this one waited for the file.

    It may have been the last shard of the set: then the notes are gone, and there is an index.
    """
    done = read_note(job.directory, job.name, job.plan) is not None
    return done or (not job.again and (job.directory / INDEX_NAME).exists())


def _write_shard(writer: ShardWriter, reader: PieceReader, job: ShardJob) -> None:
    """The shard, and its note, which is there before the shard has its name."""
    left_out: list[LeftOut] = []
    for sample in job.samples:
        trouble = _add(writer, reader, sample, job)
        left_out += [trouble] if trouble else []
    if len(writer):
        writer.finish(lambda shard: _write_note(job, shard, left_out))
    else:
        _write_note(job, None, left_out)


def _write_note(job: ShardJob, shard: Shard | None, left_out: list[LeftOut]) -> None:
    document = {
        "plan": job.plan,
        "file": asdict(shard.file) if shard else None,
        "rows": shard.rows.tolist() if shard else [],
        "left_out": [asdict(item) for item in left_out],
    }
    with atomic_file(note_path(job.directory, job.name)) as file:
        file.write(json.dumps(document).encode())


def read_note(directory: Path, name: str, plan: str) -> Finished | None:
    """What an earlier run of the same plan says about a shard, if its file is there with the stated size."""
    try:
        document = json.loads(note_path(directory, name).read_bytes())
        size = (directory / name).stat().st_size if document["file"] else 0
    except FileNotFoundError:
        return None
    if document["plan"] != plan or (document["file"] and document["file"]["bytes"] != size):
        return None
    rows = np.array([tuple(row) for row in document["rows"]], dtype=ROW)
    shard = Shard(ShardFile(**document["file"]), rows) if document["file"] else None
    return Finished(shard, tuple(LeftOut(**item) for item in document["left_out"]))


def _add(writer: ShardWriter, reader: PieceReader, sample: SourceSample, job: ShardJob) -> LeftOut | None:
    """Append a sample; what was wrong with it, if anything."""
    trouble = None
    try:
        packed = _pack(sample, reader, job)
    except UnreachableError as error:
        return LeftOut(sample.name, str(error))
    except ImageError as error:
        if job.options.undecodable == "error":
            raise ValueError(
                f"{sample.image.place}: {sample.name}: {error}. Repair or remove it, or add --undecodable leave-out."
            ) from error
        trouble = LeftOut(sample.name, str(error), kept=job.options.undecodable == "keep")
        if not trouble.kept:
            return trouble
        packed = _pack_broken(sample, reader, job)
        if packed is None:
            return LeftOut(sample.name, str(error))
    writer.add(sample.key, packed.image, packed.extension, packed.companions, sample.label)
    return trouble


def _pack(sample: SourceSample, reader: PieceReader, job: ShardJob) -> _Packed:
    """Read a sample and make it ready.

    Raises:
        ImageError: It cannot be used.
        UnreachableError: Its URL gives nothing, and such images may be left out.
        ValueError: It cannot be read, which is no matter of this image, or its URL gives nothing.
    """
    image = _read(sample, reader, job)
    facts = check_image(image, job.options.check)
    members = {name: reader.read(piece) for name, piece in sample.companions}
    for name, content in members.items():
        _check_map(content, name, facts, job)
    about: dict[str, Any] = {}
    reencoding = job.options.reencoding
    # Arrays of any number of bands stay as they are: no JPEG holds them.
    size = None if is_array(image, facts.extension) else reencoding.target(facts.width, facts.height)
    if size is not None:
        image = reencode(image, size, reencoding)
        about = {"original_size": [facts.width, facts.height], "size": list(size)}
        if size != (facts.width, facts.height):
            members = {name: resize_map(content, size) for name, content in members.items()}
    return _Packed(image, "jpg" if size else facts.extension, _companions(sample, job, about) | members)


def _read(sample: SourceSample, reader: PieceReader, job: ShardJob) -> bytes:
    try:
        return reader.read(sample.image)
    except UnreachableError as error:
        if job.options.unreachable == "leave-out":
            raise
        fix = "Correct the URL or remove it from the list" if error.permanent else "Run the same command again later"
        raise ValueError(f"{sample.image.place}: unreachable ({error}). {fix}, or add --unreachable leave-out.") from error


def _pack_broken(sample: SourceSample, reader: PieceReader, job: ShardJob) -> _Packed | None:
    """A sample as it is, checked for nothing; None if there are no bytes."""
    try:
        image = _read(sample, reader, job)
    except UnreachableError:
        return None
    try:
        extension = sniff(image)
    except ImageError:
        extension = split_member(sample.name)[1].rpartition(".")[2] or "jpg"
    members = {name: reader.read(piece) for name, piece in sample.companions}
    return _Packed(image, extension, _companions(sample, job, {}) | members)


def _companions(sample: SourceSample, job: ShardJob, about: dict[str, Any]) -> dict[str, bytes]:
    """KEY.cls, KEY.json and, if asked for, KEY.txt."""
    document: dict[str, Any] = {"name": sample.name}
    companions: dict[str, bytes] = {}
    if sample.label != NO_LABEL:
        assert job.classes is not None
        document |= {"label": sample.label, "class": job.classes[sample.label]}
        companions["cls"] = str(sample.label).encode()
    document |= about
    if sample.about:
        document |= {name: value for name, value in json.loads(sample.about).items() if name not in document}
    if job.options.captions:
        companions["txt"] = _caption(document, sample).encode()
    companions["json"] = json.dumps(document, ensure_ascii=False).encode()
    return companions


def _caption(document: dict[str, Any], sample: SourceSample) -> str:
    text = document.get("caption") or document.get("class")
    if not isinstance(text, str):
        raise ValueError(
            f"{sample.image.place}: --captions: {sample.name} has neither a caption nor a class. Use a list with a column"
            " 'caption', images in class folders, or leave out --captions."
        )
    return text


def _check_map(content: bytes, name: str, image: ImageFacts, job: ShardJob) -> None:
    """A map of classes must decode, have the size of its image, and only values that are classes."""
    if not name.endswith(".png"):
        return
    try:
        facts = check_image(content, job.options.check)
    except ImageError as error:
        raise ImageError(f"its map {name}: {error}") from error
    if facts.extension != "png":
        raise ImageError(f"its map {name} is a {facts.extension}, expected a PNG")
    if (facts.width, facts.height) != (image.width, image.height):
        raise ImageError(f"its map {name} has {facts.width}x{facts.height} pixels, the image {image.width}x{image.height}")
    try:
        check_map(content, job.largest_map_value, job.options.check)
    except ImageError as error:
        raise ImageError(f"its map {name} {error}") from error
