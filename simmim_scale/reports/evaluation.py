"""evaluation.html: one file that shows an evaluation; curves, the worst classes, and a sheet of mistakes."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from simmim_scale.reports.atomic_write import replace_file
from simmim_scale.reports.evaluation_charts import (
    MOST_CLASSES_IN_A_MATRIX,
    draw_classes,
    draw_confidence,
    draw_confusion,
    draw_reliability,
)

WORST_CLASSES, SHOWN_CONFUSIONS = 20, 20
SIDE, CAPTION, GUTTER, COLUMNS = 144, 34, 10, 6  # pixels of the sheet of mistakes
INK, WRONG = "#1d232c", "#c2410c"


@dataclass(frozen=True)
class Mistake:
    """A picture that was taken for something else.

    Attributes:
        image: (h, w, 1 or 3) uint8, as the model saw it.
        label, predicted: names of classes.
        confidence: of the prediction, a share.
        source: what the picture is in its set.
    """

    image: np.ndarray
    label: str
    predicted: str
    confidence: float
    source: str


def draw_mistakes(mistakes: Sequence[Mistake]) -> Image.Image:
    """The pictures in a grid, under each the right class and what was said instead."""
    rows = -(-len(mistakes) // COLUMNS)
    columns = min(COLUMNS, len(mistakes))
    size = (columns * (SIDE + GUTTER) + GUTTER, rows * (SIDE + CAPTION + GUTTER) + GUTTER)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, mistake in enumerate(mistakes):
        left = GUTTER + number % COLUMNS * (SIDE + GUTTER)
        top = GUTTER + number // COLUMNS * (SIDE + CAPTION + GUTTER)
        pixels = mistake.image[..., 0] if mistake.image.shape[2] == 1 else mistake.image[..., :3]
        picture = Image.fromarray(pixels).convert("RGB")
        scale = SIDE / max(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        draw.text((left, top + SIDE + 3), _fit(f"is {mistake.label}", font, draw), fill=INK, font=font)
        said = _fit(f"{mistake.confidence:.0%} {mistake.predicted}", font, draw)
        draw.text((left, top + SIDE + 18), said, fill=WRONG, font=font)
    return sheet


def _fit(text: str, font: Any, draw: ImageDraw.ImageDraw) -> str:
    while draw.textlength(text, font=font) > SIDE and len(text) > 4:
        text = text[:-4] + "..." if text.endswith("...") else text[:-1].rstrip() + "..."
    return text


def write_evaluation_page(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    results: Mapping[str, Any],
    confidence: tuple[np.ndarray, np.ndarray],
    confusion: np.ndarray | None,
    mistakes: Sequence[Mistake],
) -> None:
    """Write the page in one go.

    Args:
        facts: label -> value: what was evaluated, on what, how.
        results: as `tasks/classification/summary.py` makes them.
        confidence: of right and of wrong predictions, shares.
        confusion: (k, k) counts, rows right classes; None: too many classes to draw.
        mistakes: the most confident ones first.
    """
    present = [entry for entry in results["classes"] if entry["samples"]]
    charts = [
        (
            "Calibration",
            f"Expected calibration error {results['ece']:.3f}. Bars below the dashed line: too confident.",
            draw_reliability(results["reliability"]),
        ),
        ("Confidence", "Of right and of wrong predictions.", draw_confidence(*confidence)),
        ("Accuracy of the classes", f"{len(present):,} classes with images.", draw_classes([entry["top1"] for entry in present])),
    ]
    drawn = [(name, note, Markup(svg)) for name, note, svg in charts]
    matrix = None
    if confusion is not None and len(present) <= MOST_CLASSES_IN_A_MATRIX:
        matrix = Markup(draw_confusion([entry["name"] for entry in results["classes"]], confusion))
    environment = Environment(
        loader=PackageLoader("simmim_scale.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("evaluation.html.j2").render(
        title=title,
        facts=facts,
        results=results,
        charts=drawn,
        matrix=matrix,
        worst=sorted(present, key=lambda entry: (entry["top1"], entry["name"]))[:WORST_CLASSES],
        confusions=results["confusion"][:SHOWN_CONFUSIONS],
        sheet=_embed(draw_mistakes(mistakes)) if mistakes else "",
        mistakes=mistakes,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    replace_file(path, page.encode("utf-8"))


def _embed(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
