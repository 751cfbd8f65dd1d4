"""`python -m data_tools shard SOURCE-KIND SOURCE DST`: one command a kind of source, the same options for all."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from data_tools.console import Jobs, parse_bytes, progress_bar, resumable, say
from data_tools.jobs import available_cores
from data_tools.sources import Source

shard_app = typer.Typer(help="Pack images into webdataset tar shards with an index.", no_args_is_help=True)

Destination = Annotated[Path, typer.Argument(help="Directory to write the shards to.")]


@dataclass(frozen=True)
class _Common:
    """Options of every kind of source; each becomes an option of each command."""

    samples_per_shard: Annotated[int | None, typer.Option(help="Images a shard; default 1000.")] = None
    bytes_per_shard: Annotated[str | None, typer.Option(help="Most bytes a shard instead, such as 200MB.")] = None
    shuffle: Annotated[bool, typer.Option(help="Mix all images once, by the seed; else in the order of their names.")] = True
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0
    max_side: Annotated[
        int | None, typer.Option(help="Shrink images to this longer side, pixels; default: bytes stay untouched.")
    ] = None
    quality: Annotated[
        int | None, typer.Option(help="Encode all images as JPEG of this quality; with --max-side alone, shrunk ones at 90.")
    ] = None
    check: Annotated[
        str,
        typer.Option(
            help="structure: follow each image to its end, decode what looks odd; full: decode all; header: first bytes."
        ),
    ] = "structure"
    captions: Annotated[
        bool, typer.Option("--captions", help="Also KEY.txt, as open_clip wants it: a list's column caption, else the class.")
    ] = False
    undecodable: Annotated[
        str, typer.Option(help="Images that do not decode: leave-out or keep (both are listed in report.json), or error.")
    ] = "leave-out"
    unreachable: Annotated[
        str,
        typer.Option(
            help="URLs that are gone (404, 410) or fail after several tries: error, or leave-out (listed in report.json)."
        ),
    ] = "error"
    jobs: Jobs = None
    task: Annotated[
        str,
        typer.Option(help="i/n, i from 0: do only this part; n machines or Slurm array tasks share the work without talking."),
    ] = "0/1"
    engine: Annotated[str, typer.Option(help="local: processes here; ray: a Ray cluster (RAY_ADDRESS, or started here).")] = (
        "local"
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set of shards that is there.")] = False
    repair: Annotated[bool, typer.Option("--repair", help="Make damaged or missing shards of a complete set again.")] = False


def _command(list_source: Callable[..., Source]) -> Callable[..., None]:
    """The command of a kind of source: its own arguments, then DST, then the common options."""

    def run(destination: Path, **values: Any) -> None:
        common = _Common(**{field.name: values.pop(field.name) for field in fields(_Common)})
        with resumable(destination):
            _shard(list_source(**values), destination, common)

    own = list(inspect.signature(list_source).parameters.values())
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        own[0],
        inspect.Parameter("destination", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Destination),
        *own[1:],
    ]
    parameters += [inspect.Parameter(f.name, kind, default=f.default, annotation=f.type) for f in fields(_Common)]
    run.__signature__ = inspect.Signature([p.replace(kind=kind) for p in parameters])  # type: ignore[attr-defined]
    run.__doc__ = list_source.__doc__
    return run


def _shard(source: Source, destination: Path, common: _Common) -> None:
    from data_tools.plan import ShardOptions, Task
    from data_tools.sharding import repair_shards, write_shards

    names = {field.name for field in fields(ShardOptions)} - {"bytes_per_shard"}
    values = {name: getattr(common, name) for name in names}
    options = ShardOptions(**values, bytes_per_shard=parse_bytes("--bytes-per-shard", common.bytes_per_shard))
    for note in source.notes:
        say(f"[yellow]{escape(note)}[/]")
    jobs = common.jobs or (None if common.engine == "ray" else available_cores())
    with progress_bar("sharding", len(source.samples)) as advance:
        if common.repair:
            made = repair_shards(source, destination, options, jobs=jobs or 1, progress=advance)
            say(f"{destination}: {len(made)} shards were damaged and are made again: {', '.join(made) or 'none'}")
            return
        result = write_shards(
            source,
            destination,
            options,
            jobs=jobs,
            task=Task.parse(common.task),
            engine=common.engine,
            overwrite=common.overwrite,
            progress=advance,
        )
    _tell(result, source, destination)


def _tell(result: Any, source: Source, destination: Path) -> None:
    from data_tools.destination import REPORT_NAME

    if not result.written:
        say(f"{destination}: the same shards are there already")
        return
    if result.missing:
        say(f"{destination}: this task is done; {result.missing} shards are still to come from other tasks")
        return
    classes = "no labels" if source.classes is None else f"{len(source.classes)} classes"
    say(f"{destination}: {result.samples:,} images, {classes}, {result.shards} shards, {result.bytes / 2**20:,.1f} MiB")
    if result.ignored:
        say(f"{result.ignored:,} files that are no images by their name were not looked at")
    if result.left_out:
        first = escape(f"{result.left_out[0].name}: {result.left_out[0].cause}")
        what = "do not decode and were kept" if result.left_out[0].kept else "left out"
        say(f"[yellow]{len(result.left_out)} images {what}[/], listed in {destination / REPORT_NAME}; the first: {first}")


def _folder(
    source: Annotated[Path, typer.Argument(help="Directory of images, any nesting, or a directory written by synth.")],
    labels: Annotated[
        str, typer.Option(help="folder: the top folder is the class; none; auto: folder if there are folders.")
    ] = "auto",
) -> Source:
    """Pack a folder of images. Their bytes stay untouched; those that do not decode are left out and listed in report.json."""
    from data_tools.sources.folder import list_folder

    return list_folder(source, labels=labels)


def _imagenet(
    source: Annotated[
        Path, typer.Argument(help="The official train or val tar, a directory with it, or unpacked class folders.")
    ],
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    devkit: Annotated[Path | None, typer.Option(help="ILSVRC2012_devkit_t12.tar.gz or unpacked; default: beside SOURCE.")] = None,
) -> Source:
    """Pack ImageNet: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar as they are downloaded, or unpacked."""
    from data_tools.sources.imagenet import list_imagenet

    return list_imagenet(source, split=split, devkit=devkit)


def _inat2018(
    source: Annotated[Path, typer.Argument(help="Directory that holds train_val2018 (or test2018).")],
    annotations: Annotated[Path | None, typer.Option(help="The JSON; default: SOURCE/train2018.json, by --split.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    categories: Annotated[Path | None, typer.Option(help="categories.json with the species' names.")] = None,
) -> Source:
    """Pack iNaturalist 2018 by its JSON."""
    from data_tools.sources.inat import list_inat

    return list_inat(source, annotations=annotations, split=split, categories=categories)


def _coco(
    source: Annotated[Path, typer.Argument(help="Directory that holds train2017 and annotations.")],
    split: Annotated[str, typer.Option(help="Name of the split, such as train2017 or val2017.")] = "train2017",
    annotations: Annotated[Path | None, typer.Option(help="Default: SOURCE/annotations/instances_SPLIT.json.")] = None,
    images: Annotated[Path | None, typer.Option(help="Directory of the images; default: SOURCE/SPLIT.")] = None,
) -> Source:
    """Pack COCO with its instances: boxes, crowd flags, polygons and RLE masks go to KEY.json."""
    from data_tools.sources.coco import list_coco

    return list_coco(source, split=split, annotations=annotations, images=images)


def _ade20k(
    source: Annotated[Path, typer.Argument(help="ADEChallengeData2016.")],
    split: Annotated[str, typer.Option(help="training or validation.")] = "training",
) -> Source:
    """Pack ADE20K (scene parsing challenge): KEY.jpg and the map of 150 classes as KEY.seg.png."""
    from data_tools.sources.ade20k import list_ade20k

    return list_ade20k(source, split=split)


def _list(
    source: Annotated[Path, typer.Argument(help="CSV, TSV or JSONL with path or url, and perhaps label and key, a row.")],
    root: Annotated[Path | None, typer.Option(help="What paths are relative to; default: the list's directory.")] = None,
) -> Source:
    """Pack the images that a list names, by path or URL; its other columns go to KEY.json."""
    from data_tools.sources.listing import list_listing

    return list_listing(source, root=root)


for _name, _lister in {
    "folder": _folder,
    "imagenet": _imagenet,
    "inat2018": _inat2018,
    "coco": _coco,
    "ade20k": _ade20k,
    "list": _list,
}.items():
    shard_app.command(_name)(_command(_lister))
