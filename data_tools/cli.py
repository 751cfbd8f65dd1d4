"""`python -m data_tools`: arguments in, a line or table out. Exit codes: 0 done, 1 damage found, 2 wrong input."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from data_tools.cli_sets import DAMAGE, sets_app
from data_tools.cli_shard import shard_app
from data_tools.console import Jobs, parse_range, progress_bar, say, writing
from data_tools.jobs import available_cores
from simmim_scale.data.shards import DamageError

USER_ERROR = 2

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(shard_app, name="shard")
app.add_typer(sets_app)


def main() -> None:
    """Run the command line; wrong input (exit code 2) and damage (1) are one message, without a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(DAMAGE if isinstance(error, DamageError) else USER_ERROR)


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

    options = SynthOptions(images, seed, parse_range("--side", side), parse_range("--quality", quality))
    with writing(destination), progress_bar("rendering", images) as advance:
        written = write_dataset(destination, options, jobs=jobs or available_cores(), overwrite=overwrite, progress=advance)
    say(
        f"{destination}: {images:,} pictures in {destination / 'images'}"
        if written
        else f"{destination}: the same set is there already"
    )
