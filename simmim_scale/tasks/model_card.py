"""README.md beside weights: what the model is, how it was trained and on what, how good it is, its licence, how to load it."""

from collections.abc import Mapping
from pathlib import Path

from simmim_scale.config.schema import Config, SwinBaseConfig

CARD = "README.md"
OWN_USAGE = """```python
import simmim_scale

module = simmim_scale.load("DIR")  # this directory
```"""
# Beside numbers, what a licence line can honestly say: weights are the property of whoever trained them.
OWN_LICENCE = (
    "Of the weights: not stated by whoever trained them; say it here before passing them on. The training code is MIT-licensed."
)
IMPORTED_LICENCE = "Of the weights: that of the checkpoint they were imported from. The code that converted them is MIT-licensed."


def write_card(
    directory: str | Path,
    config: Config,
    facts: Mapping[str, str],
    *,
    metrics: Mapping[str, float] | None = None,
    usage: str = OWN_USAGE,
    remarks: list[str] | None = None,
) -> Path:
    """Write README.md into a directory of weights; returns its path.

    Args:
        facts: what is stored beside the weights: step, imported_from, layout.
        metrics: name -> last value, of the run that trained them.
        usage: Markdown that shows how to load them; DIR in it stands for the directory.
        remarks: lines for the section on the conversion; none: the section is left out.
    """
    text = model_card(config, facts, metrics=metrics or {}, usage=usage, remarks=remarks or [])
    path = Path(directory) / CARD
    path.write_text(text, encoding="utf-8")
    return path


def model_card(config: Config, facts: Mapping[str, str], *, metrics: Mapping[str, float], usage: str, remarks: list[str]) -> str:
    """The text of `write_card`."""
    imported = "imported_from" in facts
    sections = [
        (f"{config.model.name}, {_task(config)}", _model_lines(config)),
        ("How it was trained", [_imported(facts)] if imported else _recipe_lines(config, facts)),
        (
            "Metrics",
            [f"- {name}: {value:.6g}" for name, value in metrics.items()] or ["None were recorded beside these weights."],
        ),
        ("Conversion", [f"- {line}" for line in remarks]),
        ("Loading", [usage]),
        ("Licence", [IMPORTED_LICENCE if imported else OWN_LICENCE]),
    ]
    parts = [
        f"{'#' if number == 0 else '##'} {title}\n\n" + "\n".join(lines)
        for number, (title, lines) in enumerate(sections)
        if lines
    ]
    return "\n\n".join(parts) + "\n"


def _task(config: Config) -> str:
    names = {"pretrain": "pre-trained by masked image modeling (SimMIM)", "classification": "classifier", "backbone": "backbone"}
    return names.get(config.task, config.task)


def _model_lines(config: Config) -> list[str]:
    model = config.model
    height, width = model.image_size
    lines = [f"- input: {height}x{width} pixels, {model.in_chans} channels, (x / 255 - mean) / std"]
    lines.append(f"- mean {list(config.data.mean)}, std {list(config.data.std)}")
    if isinstance(model, SwinBaseConfig):
        lines.append(
            f"- width {model.embed_dim}, depths {list(model.depths)}, heads {list(model.num_heads)}, window {model.window_size},"
            f" patch {model.patch_size}"
        )
    return lines


def _imported(facts: Mapping[str, str]) -> str:
    return f"Not by this program: imported from `{facts['imported_from']}` (layout {facts.get('layout', 'unknown')})."


def _recipe_lines(config: Config, facts: Mapping[str, str]) -> list[str]:
    train, schedule = config.train, config.schedule
    length = f"{train.epochs:g} epochs" if train.epochs is not None else f"{train.steps} steps"
    done = f"; these weights are of step {facts['step']}" if "step" in facts else ""
    lines = [
        f"- data: `{config.data.train or 'not recorded'}`"
        + (f", held out: `{config.data.validation}`" if config.data.validation else ""),
        f"- length: {length}{done}; global batch {train.global_batch}; seed {config.seed}",
        f"- AdamW, base learning rate {config.optimizer.base_lr:g} at a batch of 512,"
        f" weight decay {config.optimizer.weight_decay:g}",
        f"- schedule {schedule.name} with {schedule.warmup_epochs:g} epochs of warm-up",
        f"- drop path {getattr(config.model, 'drop_path', 0):g}; precision {config.engine.precision}",
    ]
    if config.init_from:
        lines.append(f"- started from the weights in `{config.init_from}`")
    if config.task == "pretrain":
        target = config.objective.norm_target_window
        lines.append(
            f"- masking: {config.mask.sampler}, cells of {config.mask.cell} pixels, ratio {config.mask.ratio:g}; target"
            f" {config.objective.target}" + (f" normalised in windows of {target} pixels" if target else "")
        )
    return lines
