"""RUN_DIR/report.html: one file that shows a run, readable without network, on a phone and on a desk.

`write_report` reads what the run wrote: metrics.jsonl, environment.json, config.yaml, gallery/, quarantine/, reconstructions.png;
what is missing is left out, so it can be called at any time.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from simmim_scale.reports.atomic_write import replace_file
from simmim_scale.reports.charts import BLUE, GREEN, INK, ORANGE, Curve, draw_chart
from simmim_scale.reports.sinks import ENVIRONMENT_FILE, METRICS_FILE, read_metrics
from simmim_scale.reports.terminal import format_count, format_duration
from simmim_scale.reports.time_spent import account

REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"
QUARANTINE_FOLDER = "quarantine"
RECONSTRUCTIONS_FILE = "reconstructions.png"
MAX_GALLERY = 16  # pictures over training, evenly chosen; each is about 0.1-0.3 MB of the page
MAX_EVENTS = 20
WEBP_QUALITY = 85
WIDE, NORMAL = (10.0, 3.2), (5.0, 2.5)


@dataclass(frozen=True)
class Tile:
    """One number of the summary."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    svg: Markup
    wide_svg: Markup | None = None


@dataclass(frozen=True)
class GalleryPicture:
    step: int
    caption: str
    data: str


def _column(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Values of all steps, NaN where a step has none."""
    return np.array([np.nan if record.get(key) is None else record[key] for record in records], float)


def _has(records: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(record.get(key) is not None for record in records)


def _last(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((record[key] for record in reversed(records) if record.get(key) is not None), None)


def _loss_chart(records: Sequence[Mapping[str, Any]]) -> Chart:
    steps = _column(records, "step")
    curves = [Curve(steps, _column(records, "loss"), "training", smoothed=True)]
    if _has(records, "val_loss"):
        curves.append(Curve(steps, _column(records, "val_loss"), "validation", ORANGE, marked=True))
    baseline = _last(records, "val_baseline")
    note = "Lower is better."
    if baseline is not None:
        note += (
            " The dashed line is what a guess from each image's visible pixels at large (their mean colour, or the frequencies of"
            " their classes) would cost on the validation set."
        )
    level = None if baseline is None else (baseline, "guess")
    narrow, wide = (Markup(draw_chart(curves, level=level, size=size)) for size in (NORMAL, WIDE))
    return Chart("Loss", note, narrow, wide)


_PROBES = (("val_top1", "top-1"), ("val_top5", "top-5"), ("val_knn", "neighbours"), ("val_linear", "linear probe"))


def _accuracy_chart(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Accuracy on held-out images at every validation that measured it."""
    steps, colours = _column(records, "step"), (ORANGE, GREEN, BLUE, INK)
    curves = [
        Curve(steps, _column(records, key), label, colour, marked=True)
        for (key, label), colour in zip(_PROBES, colours, strict=True)
        if _has(records, key)
    ]
    if not curves:
        return []
    return [Chart("Accuracy", "Percent of held-out images.", Markup(draw_chart(curves, size=NORMAL, from_zero=True)))]


_SHARE = {"percent": True, "from_zero": True}
_SMALL_CHARTS: tuple[
    tuple[str, str, str, dict[str, Any], dict[str, Any]], ...
] = (  # key, title, note, of the chart, of its curve
    ("lr", "Learning rate", "As applied at each step.", {"from_zero": True}, {}),
    (
        "images_per_second",
        "Images per second",
        "Without validation and saving.",
        {"from_zero": True},
        {"colour": GREEN, "smoothed": True},
    ),
    ("grad_norm", "Gradient norm", "Before clipping.", {"from_zero": True}, {"smoothed": True}),
    (
        "data_wait",
        "Waiting for data",
        "Share of a step's time.",
        {**_SHARE, "at_least": 0.1},
        {"colour": GREEN, "smoothed": True},
    ),
    ("loss_scale", "Loss scale", "fp16 only.", {"from_zero": True}, {}),
    ("mfu", "Model FLOP utilisation", "Share of the devices' peak.", _SHARE, {"colour": GREEN}),
)


def _small_charts(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    steps = _column(records, "step")
    return [
        Chart(title, note, Markup(draw_chart([Curve(steps, _column(records, key), **style)], size=NORMAL, **options)))
        for key, title, note, options, style in _SMALL_CHARTS
        if _has(records, key)
    ]


def _charts(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    return [_loss_chart(records), *_accuracy_chart(records), *_small_charts(records)] if records else []


def _accuracies(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    found = ((label, _last(records, key)) for key, label in (("val_top1", "Top-1"), ("val_top5", "Top-5")))
    return [(label, value) for label, value in found if value is not None]


def _validation_tiles(records: Sequence[Mapping[str, Any]]) -> list[Tile]:
    loss, baseline = _last(records, "val_loss"), _last(records, "val_baseline")
    if loss is None:
        return []
    note = f"{1 - loss / baseline:.0%} below a guess from what is visible ({baseline:.4f})" if baseline else ""
    best = min((record for record in records if record.get("val_loss") is not None), key=lambda record: record["val_loss"])
    tiles = [Tile("Validation loss", f"{loss:.4f}", note)]
    tiles += [Tile(label, f"{value:.2f} %", "latest validation") for label, value in _accuracies(records)]
    return (
        tiles
        if best["val_loss"] == loss
        else [*tiles, Tile("Best validation", f"{best['val_loss']:.4f}", f"at step {best['step']:,}")]
    )


def summarise(records: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """The run in a few numbers; none where nothing was trained yet."""
    if not records:
        return []
    tail = _column(records[-max(1, len(records) // 50) :], "loss")
    loss = np.mean(tail[np.isfinite(tail)]) if np.isfinite(tail).any() else np.nan
    tiles = [*_validation_tiles(records), Tile("Training loss", f"{loss:.4f}", "mean of the last 2% of steps")]
    tiles.append(Tile("Steps", f"{records[-1]['step']:,}", f"{records[-1]['epoch']:.2f} epochs"))
    rates, seconds = _column(records, "images_per_second"), _column(records, "seconds")
    if np.isfinite(rates).any():
        tiles.append(Tile("Images per second", format_count(float(np.nanmedian(rates))), "median over steps"))
    if np.isfinite(seconds).any():
        tiles.append(Tile("Training time", format_duration(float(np.nansum(seconds))), "without validation and saving"))
    memory = _column(records, "memory_gib")
    if np.isfinite(memory).any():
        tiles.append(Tile("Memory", f"{np.nanmax(memory):.2f} GiB", "most on the main rank"))
    saves = [record for record in records if record.get("save_seconds") is not None]
    if saves:
        seconds_each = sum(record["save_seconds"] for record in saves) / len(saves)
        tiles.append(Tile("A save", f"{saves[-1]['save_gib']:.3f} GiB", f"complete after {seconds_each:.2f} s on average"))
    skipped = sum(bool(record.get("skipped")) for record in records)
    return [*tiles, Tile("Skipped steps", str(skipped), "loss or gradients not finite")] if skipped else tiles


def _validation_table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(names, rows) of the latest validations, newest first."""
    validated = [record for record in records if any(key.startswith("val_") for key in record)]
    names = sorted({key for record in validated for key in record if key.startswith("val_")})
    rows = [
        [f"{record['step']:,}", *("" if record.get(name) is None else f"{record[name]:.4f}" for name in names)]
        for record in validated[-MAX_EVENTS:][::-1]
    ]
    return ["step", *(name.removeprefix("val_").replace("_", " ") for name in names)], rows if names else []


def _embed(path: Path) -> str:
    """The picture as a data address: WebP, since photographs as PNG make a page of many megabytes."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, format="WEBP", quality=WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _gallery(run_dir: Path, records: Sequence[Mapping[str, Any]]) -> list[GalleryPicture]:
    """At most MAX_GALLERY pictures over training, first and last included."""
    found = sorted((run_dir / "gallery").glob("step_*.png"))
    chosen = (
        sorted(set(np.linspace(0, len(found) - 1, min(len(found), MAX_GALLERY)).round().astype(int).tolist())) if found else []
    )
    losses = {record["step"]: record.get("val_loss") for record in records}
    pictures = []
    for path in (found[index] for index in chosen):
        step = int(path.stem.removeprefix("step_"))
        loss = losses.get(step)
        pictures.append(
            GalleryPicture(step, f"step {step:,}" + ("" if loss is None else f", validation loss {loss:.4f}"), _embed(path))
        )
    return pictures


def _replaced_images(run_dir: Path) -> list[dict[str, Any]]:
    """Images that could not be decoded, each once, from the lists of all ranks; lines that a crash cut off are left out."""
    images: dict[str, dict[str, Any]] = {}
    for path in sorted((run_dir / QUARANTINE_FOLDER).glob("**/*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                images.setdefault(str(entry["name"]), {"name": entry["name"], "cause": entry["cause"]})
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return [images[name] for name in sorted(images)]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _page_facts(run_dir: Path) -> dict[str, Any]:
    """Everything that the template shows."""
    records = read_metrics(run_dir / METRICS_FILE)
    environment = _read_json(run_dir / ENVIRONMENT_FILE)
    final = run_dir / RECONSTRUCTIONS_FILE
    names, rows = _validation_table(records)
    return {
        "title": run_dir.resolve().name,
        "environment": environment,
        "tiles": summarise(records),
        "charts": _charts(records),
        "spent": account(records),
        "reconstructions": _embed(final) if final.exists() else "",
        "local_statistics": _has_normalised_target(run_dir / CONFIG_FILE),
        "gallery": _gallery(run_dir, records),
        "validation_names": names,
        "validation_rows": rows,
        "replaced": _replaced_images(run_dir),
        "max_events": MAX_EVENTS,
        "skipped": [record for record in records if record.get("skipped")][-MAX_EVENTS:][::-1],
        "config": _read_text(run_dir / CONFIG_FILE),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _has_normalised_target(config: Path) -> bool:
    """Whether predictions were drawn with the local mean and contrast of the true picture put back."""
    try:
        settings = yaml.safe_load(_read_text(config)) or {}
    except yaml.YAMLError:
        return False
    return isinstance(settings, dict) and bool((settings.get("objective") or {}).get("norm_target_window"))


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html from what the run has written so far, in one go.

    Raises:
        ValueError: there is no such directory, or a file in it is not what a run writes.
    """
    if not any((run_dir / name).is_file() for name in (CONFIG_FILE, METRICS_FILE, ENVIRONMENT_FILE)):
        raise ValueError(
            f"report: {run_dir} is no run directory. Give the directory that a run wrote to (run_dir in its configuration)."
        )
    environment = Environment(
        loader=PackageLoader("simmim_scale.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(_page_facts(run_dir))
    path = run_dir / REPORT_FILE
    replace_file(path, page.encode("utf-8"))
    return path
