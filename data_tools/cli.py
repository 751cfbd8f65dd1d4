"""`python -m data_tools`: arguments in, a line or table out. Exit codes: 0 done, 1 damage found, 2 wrong input."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_tools.jobs import available_cores

USER_ERROR, DAMAGE = 2, 1

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
shard_app = typer.Typer(help="Pack images into webdataset tar shards with an index.", no_args_is_help=True)
app.add_typer(shard_app, name="shard")

Jobs = Annotated[int | None, typer.Option(help="Processes; default: all cores. The result does not depend on it.", min=1)]


def main() -> None:
    """Run the command line; what the user got wrong is one message and exit code 2, without a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(USER_ERROR)


@app.command()
def synth(
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    images: Annotated[int, typer.Option(help="Number of pictures.")] = 2000,
    seed: Annotated[int, typer.Option(help="Another seed gives other pictures of the same classes.")] = 0,
    side: Annotated[str, typer.Option(help="Range of the shorter side, pixels: LOW-HIGH, or one number.")] = "192-256",
    quality: Annotated[str, typer.Option(help="Range of the JPEG quality: LOW-HIGH, or one number.")] = "82-95",
    jobs: Jobs = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a rendered set that is there.")] = False,
) -> None:
    """Render photograph-like pictures: a folder a class in DST/images, category maps in DST/masks, boxes in DST/annotations."""
    from data_tools.synth.dataset import SynthOptions, write_dataset

    options = SynthOptions(images, seed, _parse_range("--side", side), _parse_range("--quality", quality))
    with _progress("rendering", images) as advance:
        written = write_dataset(destination, options, jobs=jobs or available_cores(), overwrite=overwrite, progress=advance)
    _say(
        f"{destination}: {images:,} pictures in {destination / 'images'}"
        if written
        else f"{destination}: the same set is there already"
    )


@shard_app.command()
def folder(
    source: Annotated[Path, typer.Argument(help="Directory of images, any nesting, or a directory written by synth.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write the shards to.")],
    samples_per_shard: Annotated[int, typer.Option(help="Images a shard.")] = 1000,
    shuffle: Annotated[bool, typer.Option(help="Mix all images once, by the seed; else in the order of their names.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    labels: Annotated[
        str, typer.Option(help="folder: the top folder is the class; none; auto: folder if there are folders.")
    ] = "auto",
    check: Annotated[str, typer.Option(help="full: decode every image; header: look at its first bytes only.")] = "full",
    jobs: Jobs = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set of shards that is there.")] = False,
) -> None:
    """Pack a folder of images. Their bytes stay untouched; those that do not decode are left out and listed in report.json."""
    from data_tools.sharding import REPORT_NAME, ShardOptions, write_shards
    from data_tools.sources.folder import list_folder

    options = ShardOptions(samples_per_shard=samples_per_shard, shuffle=shuffle, seed=seed, check=check)
    images = list_folder(source, labels=labels)
    with _progress("sharding", len(images.samples)) as advance:
        result = write_shards(images, destination, options, jobs=jobs or available_cores(), overwrite=overwrite, progress=advance)
    if not result.written:
        _say(f"{destination}: the same shards are there already")
        return
    classes = "no labels" if images.classes is None else f"{len(images.classes)} classes"
    _say(f"{destination}: {result.samples:,} images, {classes}, {result.shards} shards, {result.bytes / 2**20:,.1f} MiB")
    if result.ignored:
        _say(f"{result.ignored:,} files that are no images by their name were not looked at")
    if result.left_out:
        first = escape(f"{result.left_out[0].name}: {result.left_out[0].cause}")
        listed = destination / REPORT_NAME
        _say(f"[yellow]{len(result.left_out)} images left out[/], listed in {listed}; the first: {first}")


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Directory of shards.")],
    decode: Annotated[bool, typer.Option(help="Also decode every image.")] = True,
    jobs: Jobs = None,
) -> None:
    """Compare shards with their index: sizes, checksums, place and label of every sample, decodability. Damage: exit code 1."""
    from data_tools.verify import load_index, verify_shards

    index = load_index(directory)
    with _progress("verifying", len(index)) as advance:
        problems = verify_shards(index, decode=decode, jobs=jobs or available_cores(), progress=advance)
    for problem in problems:
        _say(f"[red]{escape(problem)}[/]")
    if problems:
        _say(
            f"{directory}: {len(problems)} problems. Copy the shards again from where they were made, or shard the source again."
        )
        raise typer.Exit(DAMAGE)
    _say(f"{directory}: {len(index):,} samples in {len(index.shards)} shards are as the index says")


def _say(message: str) -> None:
    Console(soft_wrap=True).print(message, highlight=False)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, nothing when output goes to a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _parse_range(name: str, text: str) -> tuple[int, int]:
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name}: a range LOW-HIGH of whole numbers, or one number, got {text!r}.")
    return int(parts[0]), int(parts[-1])
