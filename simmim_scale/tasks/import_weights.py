"""`simmim import-weights`: a checkpoint of another program -> portable weights, every tensor accounted for."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from simmim_scale.config.load import validate
from simmim_scale.config.lookup import lookup
from simmim_scale.config.schema import IMAGENET_MEAN, IMAGENET_STD, Config
from simmim_scale.config.yaml_source import Source
from simmim_scale.models.layouts import LAYOUTS
from simmim_scale.models.layouts.checkpoint_file import read_checkpoint
from simmim_scale.models.layouts.records import Hints, Imported
from simmim_scale.models.weights import compare_state, save_weights
from simmim_scale.tasks.model_card import write_card
from simmim_scale.tasks.pretrained import CLASS_NAMES, assemble

USUAL_CELLS = (32, 16, 8, 4)  # pixels; the first that divides the image becomes the mask cell where the file stores none


@dataclass(frozen=True)
class ImportedWeights:
    """What was written, and where each fact that the tensors do not tell is from."""

    directory: Path
    config: Config
    num_parameters: int
    notes: list[str]


def import_weights(
    file: str | Path, out: str | Path, *, layout: str = "microsoft", hints: Hints | None = None
) -> ImportedWeights:
    """Read a checkpoint, find out its configuration, check that every tensor has its place, and write portable weights.

    Args:
        file: .pth, .pt, .bin or .safetensors, or a directory that timm or transformers saved.
        out: directory to write to.
        layout: a name of `LAYOUTS`, or 'module:attribute' of a function (CheckpointFile, Hints) -> Imported.
        hints: what is known about the checkpoint where it does not tell.

    Raises:
        ValueError: unreadable, of another layout, or with tensors left over, missing or of an unexpected shape: lists them.
    """
    convert = lookup(LAYOUTS, layout, setting="layout")
    imported: Imported = convert(read_checkpoint(file), hints or Hints())
    config = build_config(imported)
    _check_complete(imported, config, source=str(file))
    facts = {"imported_from": Path(file).name, "layout": layout}
    if imported.class_names:
        facts[CLASS_NAMES] = json.dumps(imported.class_names)
    save_weights(out, imported.state, config.model_dump(mode="json"), facts)
    write_card(out, config, facts)
    return ImportedWeights(
        directory=Path(out),
        config=config,
        num_parameters=sum(value.numel() for value in imported.state.values()),
        notes=imported.notes,
    )


def build_config(imported: Imported) -> Config:
    """A whole configuration around the imported sections; what a checkpoint cannot tell has its default."""
    model = imported.sections["model"]
    mask = dict(imported.sections.get("mask", {}))
    mask.setdefault("cell", next((cell for cell in USUAL_CELLS if not any(side % cell for side in model["image_size"])), 1))
    tree = {**imported.sections, "task": imported.task, "mask": mask}
    channels = model["in_chans"]
    if channels != len(IMAGENET_MEAN) and "data" not in tree:
        # Nobody stores the statistics of other channels: the mean of ImageNet's, for each.
        tree["data"] = {"mean": [sum(IMAGENET_MEAN) / 3] * channels, "std": [sum(IMAGENET_STD) / 3] * channels}
        imported.notes.append(f"mean and std: the average of ImageNet's for each of {channels} channels (a guess; set your own)")
    return validate(Source(tree=tree))


def _check_complete(imported: Imported, config: Config, *, source: str) -> None:
    with torch.device("meta"):
        module = assemble(config, imported.state)
    report = compare_state(module, imported.state)
    if report.fits:
        return
    problems = []
    if report.unexpected:
        problems.append(_lines("left over", [imported.origins.get(name, name) for name in report.unexpected]))
    if report.missing:
        problems.append(_lines("missing (our names)", report.missing))
    if report.mismatched:
        shapes = [f"{imported.origins.get(m.name, m.name)}: got {m.got}, expected {m.expected}" for m in report.mismatched]
        problems.append(_lines("of another shape", shapes))
    raise ValueError(
        f"checkpoint: {source} is not a {config.model.name} {config.task} model as published:\n" + "\n".join(problems) + "\n"
        "Such a model is not supported; nothing was written."
    )


def _lines(what: str, names: list[str]) -> str:
    return "\n".join([f"  {len(names)} {what}:", *(f"    {name}" for name in names)])
