"""Commands on sets of shards that are there: index, verify, stats."""

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools.console import Jobs, progress_bar, say, writing
from data_tools.jobs import available_cores
from simmim_scale.data.shards import DamageError, ShardIndex

DAMAGE = 1
_MOST_CAUSES = 3  # that are printed

sets_app = typer.Typer()

Shards = Annotated[Path, typer.Argument(help="Directory of shards.")]


@sets_app.command()
def index(
    directory: Annotated[Path, typer.Argument(help="Directory of webdataset tars made elsewhere.")],
    pattern: Annotated[str, typer.Option(help="Which of its files, by name.")] = "*.tar",
    labels: Annotated[str, typer.Option(help="auto: from KEY.cls where it is there; none.")] = "auto",
    classes: Annotated[Path | None, typer.Option(help="Text file with a class name a line, in the order of the labels.")] = None,
    jobs: Jobs = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
) -> None:
    """Write the index of tars made elsewhere, so that they can be trained on; the tars stay as they are."""
    from data_tools.index_tars import build_index, find_tars

    with progress_bar("indexing", len(find_tars(directory, pattern))) as advance:
        made = build_index(
            directory,
            pattern=pattern,
            labels=labels,
            classes=classes,
            jobs=jobs or available_cores(),
            overwrite=overwrite,
            progress=advance,
        )
    what = "no labels" if made.classes is None else f"{len(made.classes)} classes"
    say(f"{directory}: {len(made):,} samples, {what}, in {len(made.shards)} tars")


@sets_app.command()
def verify(
    directory: Shards,
    decode: Annotated[bool, typer.Option(help="Also decode every image.")] = True,
    repair: Annotated[bool, typer.Option("--repair", help="First rebuild what can be: the index, the end of a tar.")] = False,
    jobs: Jobs = None,
) -> None:
    """Compare shards with their index: sizes, checksums, place and label of every sample, decodability. Damage: exit code 1."""
    from data_tools.repair import repair_set
    from data_tools.verify import load_index, verify_shards

    cores = jobs or available_cores()
    try:
        for sentence in repair_set(directory, jobs=cores) if repair else ():
            say(f"[green]repaired[/] {escape(sentence)}")
        index_ = load_index(directory)
    except DamageError as error:
        say(f"[red]{escape(str(error))}[/]")
        raise typer.Exit(DAMAGE) from error
    with progress_bar("verifying", len(index_)) as advance:
        problems = verify_shards(index_, decode=decode, jobs=cores, progress=advance)
    for problem in problems:
        say(f"[red]{escape(problem)}[/]")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        say(
            f"{directory}: {count}. An index is rebuilt by `python -m data_tools verify {directory} --repair`; damaged shards by"
            " the `python -m data_tools shard` command that made them, with --repair, or by copying them again."
        )
        raise typer.Exit(DAMAGE)
    say(f"{directory}: {len(index_):,} samples in {len(index_.shards)} shards are as the index says")


@sets_app.command()
def stats(
    directory: Shards,
    out: Annotated[Path | None, typer.Option(help="Directory for stats.json and pictures; default: DIRECTORY_stats.")] = None,
    images: Annotated[int, typer.Option(help="Random images to decode for sizes, mean and std; 0: all.", min=0)] = 5000,
    in_chans: Annotated[int, typer.Option(help="Channels, as model.in_chans: 1 luma, 3 RGB, else so many bands.", min=1)] = 3,
    band_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help="LOW HIGH, as data.band_range: values of NPY and multi-band TIFF files that become 0 and 255."),
    ] = None,
    sheet: Annotated[int, typer.Option(help="Pictures on the sample sheet.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    jobs: Jobs = None,
) -> None:
    """Print and draw class balance, image sizes, bytes, mean and standard deviation, and a sheet of samples."""
    from data_tools.stats import Channels, choose, default_output, measure, thumbnails
    from data_tools.stats_drawing import draw_sheet, draw_stats

    index_ = ShardIndex.load(directory)
    channels = Channels(in_chans, band_range)
    target = out or default_output(directory)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    with progress_bar("measuring", min(images or len(index_), len(index_))) as advance:
        found = measure(index_, images=images, channels=channels, seed=seed, jobs=jobs or available_cores(), progress=advance)
    facts = found.as_json()
    if not facts["measured_images"]:
        _report_unmeasured(directory, facts, in_chans)
    pictures = thumbnails(index_, choose(len(index_), sheet, seed + 1), channels=channels)
    with writing(target):
        (target / "stats.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draw_stats(found, target / "stats.png")
        draw_sheet(pictures, target / "samples.png")
    Console(soft_wrap=True).print(_table(facts))
    say(f"written: {target / 'stats.json'}, {target / 'stats.png'}, {target / 'samples.png'}")


def _report_unmeasured(directory: Path, facts: dict, in_chans: int) -> NoReturn:
    say(
        f"[red]{directory}: none of the {facts['broken_images']:,} images looked at decodes to {in_chans} channels:"
        f" {escape(_causes(facts))}.[/] Give the number of their bands as --in-chans and the range of their values as"
        " --band-range; damage is listed by `python -m data_tools verify`."
    )
    raise typer.Exit(DAMAGE)


@sets_app.command("fit-clusters")
def fit_clusters(
    directory: Shards,
    out: Annotated[Path, typer.Option(help="File to write, *.npy: (centres, 3) in [-1, 1], as iGPT's.")],
    centres: Annotated[int, typer.Option(help="Number of RGB centres; 512 in iGPT.", min=2, max=32767)] = 512,
    images: Annotated[int, typer.Option(help="Random images to look at; 0: all.", min=0)] = 5000,
    pixels: Annotated[int, typer.Option(help="Random pixels of each.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the choice and of the k-means.", min=0)] = 0,
    jobs: Jobs = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Fit RGB centres to the pixels of a set by k-means, for objective.target=clusters."""
    from data_tools.clusters import fit_clusters as fit
    from data_tools.clusters import save_palette
    from data_tools.verify import load_index

    index_ = load_index(directory)
    options = {"centres": centres, "images": images, "pixels": pixels, "seed": seed, "jobs": jobs or available_cores()}
    with progress_bar("reading", min(images or len(index_), len(index_))) as advance:
        palette = fit(index_, **options, progress=advance)
    with writing(out):
        save_palette(palette, out, overwrite=overwrite)
    say(
        f"{out}: {len(palette.centres)} centres of {palette.pixels:,} pixels; a pixel is {palette.distance:.1f} of 255 from its"
        f" centre (root mean square). Use it with objective.target=clusters objective.centres={out} objective.downsample=4."
    )


def _table(facts: dict) -> Table:
    table = Table(show_header=False)
    table.add_row("samples", f"{facts['samples']:,} in {facts['shards']:,} shards, {facts['bytes'] / 2**20:,.1f} MiB")
    table.add_row("classes", _balance(facts))
    for name, title in (("image_bytes", "bytes an image"), ("width", "width"), ("height", "height")):
        spread = facts[name]
        if spread is not None:
            text = "{least:,.0f} to {largest:,.0f}, median {median:,.0f}, mean {mean:,.1f}".format(**spread)
            table.add_row(title, text)
    channels = {1: "luma", 3: "R, G, B"}.get(len(facts["mean"]), "the bands")
    table.add_row(f"mean of {channels}", ", ".join(f"{value:.4f}" for value in facts["mean"]))
    table.add_row(f"std of {channels}", ", ".join(f"{value:.4f}" for value in facts["std"]))
    causes = f": {escape(_causes(facts))}" if facts["broken_images"] else ""
    table.add_row("measured on", f"{facts['measured_images']:,} images; {facts['broken_images']:,} did not decode{causes}")
    return table


def _causes(facts: dict) -> str:
    """Why images did not decode, the most frequent causes first."""
    causes = [f"{count:,} times {cause}" for cause, count in facts["broken_causes"].items()]
    return "; ".join(causes[:_MOST_CAUSES]) + ("; and others" if len(causes) > _MOST_CAUSES else "")


def _balance(facts: dict) -> str:
    classes = facts["classes"]
    if not classes or not sum(classes.values()):
        return f"no labels{f' ({len(classes)} class names)' if classes else ''}"
    least, largest = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    text = f"{len(classes):,}; smallest {least} with {classes[least]:,}, largest {largest} with {classes[largest]:,}"
    return text + (f"; {facts['unlabelled']:,} samples without" if facts["unlabelled"] else "")
