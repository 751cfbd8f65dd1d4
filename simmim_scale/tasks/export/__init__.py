"""`simmim export`: weights for another program, loaded with that program and compared before they get their name.

A target is a `records.Target`: it writes files, and loads them again to compare outputs. Start reading at `export_weights`.
"""

import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from simmim_scale.config.lookup import lookup
from simmim_scale.tasks.export.records import TOLERANCE, Agreement, Source, Target
from simmim_scale.tasks.model_card import write_card

# name -> "module:function" that gives a Target; resolved when asked for.
TARGETS: Mapping[str, str] = {
    "timm": "simmim_scale.tasks.export.timm:target",
    "microsoft": "simmim_scale.tasks.export.microsoft:target",
    "huggingface": "simmim_scale.tasks.export.huggingface:target",
    "torchvision-detection-backbone": "simmim_scale.tasks.export.detection:target",
    "onnx": "simmim_scale.tasks.export.onnx:target",
}


@dataclass(frozen=True)
class Exported:
    """What was written, how close the loaded outputs are, and what to know. `unverified` says why nothing was compared."""

    directory: Path
    agreements: list[Agreement]
    unverified: str | None
    notes: list[str]


def export_weights(source: Source, out: str | Path, *, to: str) -> Exported:
    """Write `source` for another program, and a model card; the directory appears complete and compared, or not at all.

    Args:
        out: a new or empty directory.
        to: a name of `TARGETS`, or 'module:attribute' of a function that returns a Target.

    Raises:
        ValueError: the program has no such model, `out` is not empty, or what was loaded computes something else.
    """
    out = Path(out)
    target: Target = lookup(TARGETS, to, setting="--to")()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not empty. Choose a new directory.")
    aside = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)  # ours by its name: what a killed export left
    aside.mkdir(parents=True)
    try:
        exported = _export_to(source, target, aside, to=to)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Exported(out, exported.agreements, exported.unverified, exported.notes)


def _export_to(source: Source, target: Target, directory: Path, *, to: str) -> Exported:
    written = target.write(source, directory)
    agreements, unverified = _verify(source, target, directory)
    far = [agreement for agreement in agreements if not agreement.difference <= TOLERANCE]
    if far:
        listed = ", ".join(f"{agreement.output} by {agreement.difference:.1e}" for agreement in far)
        raise ValueError(
            f"--to {to}: the loaded model computes something else ({listed}; {TOLERANCE:g} would be rounding). Nothing written."
            + "".join(f" {note}" for note in written.notes)
        )
    exported = Exported(directory, agreements, unverified, written.notes)
    remarks = [*written.notes, *verification_lines(exported)]
    write_card(
        directory,
        source.config,
        source.pretrained.extra,
        metrics=source.metrics,
        usage=written.usage,
        remarks=[f"exported for {to}", *remarks],
    )
    return exported


def _verify(source: Source, target: Target, directory: Path) -> tuple[list[Agreement], str | None]:
    missing = [name for name in target.libraries if not _importable(name)]
    if missing:
        return [], f"{' and '.join(missing)} cannot be imported here ({target.install} installs it)"
    with torch.inference_mode():
        return target.verify(source, directory), None


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise  # the package is there and fails by itself: its own message is the useful one
        return False
    return True


def verification_lines(exported: Exported) -> list[str]:
    """For a person: how close each output is, or why it is not known."""
    if exported.unverified:
        return [f"NOT verified: {exported.unverified}"]
    return [f"loaded and compared: {item.output} differs by at most {item.difference:.1e}" for item in exported.agreements]
