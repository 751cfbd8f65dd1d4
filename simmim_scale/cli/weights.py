"""`simmim import-weights`, `simmim predict` and `simmim reconstruct`: call what does the work and say what came of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from simmim_scale.models.layouts.records import Hints
from simmim_scale.tasks.import_weights import import_weights
from simmim_scale.tasks.predict import load_classifier
from simmim_scale.tasks.reconstruct import reconstruct


def make_hints(
    window: int | None, pretrained_windows: str | None, image_size: int | None, norm_target_window: int | None
) -> Hints:
    """The options of `simmim import-weights` as hints. Raises ValueError for a list that is not numbers."""
    try:
        windows = tuple(int(part) for part in pretrained_windows.split(",")) if pretrained_windows else None
    except ValueError:
        raise ValueError(f"--pretrained-windows: expected numbers such as 12,12,12,6, got {pretrained_windows!r}.") from None
    return Hints(
        window_size=window,
        pretrained_window_sizes=windows,
        image_size=(image_size, image_size) if image_size else None,
        norm_target_window=norm_target_window,
    )


def import_and_report(file: Path, out: Path, *, layout: str, hints: Hints, console: Console) -> None:
    """Imports a checkpoint and prints what it turned out to be, and how each fact that is not in the tensors was decided."""
    imported = import_weights(file, out, layout=layout, hints=hints)
    model = imported.config.model
    console.print(f"{file}: {model.name}, {imported.num_parameters / 1e6:.1f}M parameters", markup=False)
    for key, value in model.model_dump(mode="json", exclude={"name"}).items():
        console.print(f"  {key}: {value}", markup=False)
    for note in imported.notes:
        console.print(f"  note: {note}", markup=False)
    console.print(f"written to {imported.directory}", markup=False)


def predict_and_report(weights: Path, images: Sequence[Path], *, top: int, batch: int, as_json: bool, console: Console) -> None:
    """Prints the most probable classes of each picture, as text or as one JSON object from path to guesses."""
    classifier = load_classifier(weights)
    guesses = classifier.predict(images, top=top, batch=batch)
    if as_json:
        found = {str(path): [asdict(guess) for guess in row] for path, row in zip(images, guesses, strict=True)}
        console.print(json.dumps(found, indent=2), markup=False)
        return
    for path, row in zip(images, guesses, strict=True):
        console.print(str(path), markup=False)
        for guess in row:
            console.print(f"  {guess.probability:7.2%}  {guess.name}", markup=False)


def reconstruct_and_report(
    weights: Path,
    photo: Path,
    out: Path,
    *,
    seed: int,
    ratio: float | None,
    cell: int | None,
    sampler: str | None,
    console: Console,
) -> None:
    """Draws a reconstruction and prints where it is and how good it is."""
    drawn = reconstruct(weights, photo, out, seed=seed, ratio=ratio, cell=cell, sampler=sampler)
    console.print(f"{drawn.path}: {drawn.hidden} of {drawn.cells} cells hidden, loss {drawn.loss:.4f}", markup=False)
    if drawn.local_statistics:
        console.print(
            "The model predicts detail relative to its surroundings; the true picture's local mean and contrast were put back.",
            markup=False,
        )
