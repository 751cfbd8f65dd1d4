"""`simmim fit-tokenizer`: arguments in, a file and a line out."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from simmim_scale.tasks.fit_tokenizer import TokenizerOptions, fit_tokenizer


def fit_and_report(shards: str, out: Path, options: TokenizerOptions, *, console: Console) -> None:
    """Train with a bar on the terminal, and say what came out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=options.steps)
        fitted = fit_tokenizer(
            shards,
            out,
            options,
            device=device,
            progress=lambda step, loss: bar.update(task, completed=step, description=f"loss {loss:.4f}"),
        )
    console.print(
        f"{out}: {options.codes:,} codes, of which the last batch used {fitted.used:,}; its root mean squared error was"
        f" {255 * fitted.error**0.5:.1f} of 255. Use it with objective.target=tokens objective.tokenizer={out}."
    )
