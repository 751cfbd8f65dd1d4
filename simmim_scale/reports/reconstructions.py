"""Pictures of what a masked-image model predicts: original | masked | prediction, row by row.

Letters: h, w = pixels, c = channels (1 or 3), gh, gw = cells of the mask.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simmim_scale.reports.atomic_write import replace_file

DEFAULT_TITLES = ("original", "masked", "prediction")
MASK_COLOUR = (205, 205, 210)
PAPER, INK = (255, 255, 255), (60, 64, 72)
GUTTER, GROUP_GUTTER, MARGIN, TITLE_HEIGHT, TITLE_SIZE = 4, 20, 12, 28, 17
SMALLEST_SIDE = 160  # smaller pictures are enlarged by a whole factor, so that a person sees something


def expand_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(gh, gw) bool -> (height, width) bool, by repetition.

    Raises:
        ValueError: the mask's grid does not divide the picture.
    """
    rows, columns = mask.shape
    if height % rows or width % columns:
        raise ValueError(f"mask: a grid that divides the picture of {height}x{width} pixels, got {rows}x{columns} cells.")
    return mask.repeat(height // rows, axis=0).repeat(width // columns, axis=1)


def hide(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture (h, w, c) uint8 with hidden cells (gh, gw, True = hidden) painted in one light grey."""
    hidden = expand_mask(mask, *image.shape[:2])[..., None]
    colour = np.array(MASK_COLOUR, np.uint8)[: image.shape[2]]
    return np.where(hidden, colour, image)


def fill_hidden(image: np.ndarray, prediction: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What the model sees, completed: `prediction` in hidden cells, `image` elsewhere. Both (h, w, c) uint8."""
    return np.where(expand_mask(mask, *image.shape[:2])[..., None], prediction, image)


def _as_picture(array: np.ndarray, factor: int) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(
            f"rows: uint8 arrays (height, width, 1 or 3), got {array.dtype} of shape {array.shape}. Convert them before drawing."
        )
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB")
    size = (picture.width * factor, picture.height * factor)
    return picture if factor == 1 else picture.resize(size, Image.Resampling.NEAREST)


def _check_rows(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> tuple[int, int]:
    """Height and width that all pictures share."""
    if not rows:
        raise ValueError("rows: at least one row of pictures, got none.")
    for index, row in enumerate(rows):
        if len(row) != len(titles):
            raise ValueError(f"rows: one picture per title {tuple(titles)}, got {len(row)} in row {index}.")
    sizes = {picture.shape[:2] for row in rows for picture in row}
    if len(sizes) != 1:
        raise ValueError(f"rows: pictures of one size, got {sorted(sizes)}. Resize them first.")
    return sizes.pop()


def draw_reconstructions(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = DEFAULT_TITLES, *, groups: int | None = None
) -> Image.Image:
    """Arrange rows of pictures under column titles.

    Args:
        rows: each (original, masked, prediction), or as many pictures as there are titles: (h, w, c) uint8, all of one size.
        titles: one per column.
        groups: rows that stand side by side; None: two where there are at least four, so that the picture is not a long strip.

    Returns:
        An RGB picture. Small inputs are enlarged by a whole factor (nearest neighbour: pixels stay what they are).

    Raises:
        ValueError: nothing to draw, or pictures of different sizes or types.
    """
    height, width = _check_rows(rows, titles)
    groups = groups or (2 if len(rows) >= 4 else 1)
    factor = max(1, -(-SMALLEST_SIDE // min(height, width)))
    height, width = height * factor, width * factor
    group_width = len(titles) * width + (len(titles) - 1) * GUTTER
    lines = -(-len(rows) // groups)
    canvas = Image.new(
        "RGB",
        (
            2 * MARGIN + groups * group_width + (groups - 1) * GROUP_GUTTER,
            MARGIN + TITLE_HEIGHT + lines * (height + GUTTER) - GUTTER + MARGIN,
        ),
        PAPER,
    )
    lefts = [MARGIN + group * (group_width + GROUP_GUTTER) for group in range(groups)]
    _draw_titles(canvas, titles, lefts, width)
    for index, row in enumerate(rows):
        top = MARGIN + TITLE_HEIGHT + (index // groups) * (height + GUTTER)
        for column, picture in enumerate(row):
            canvas.paste(_as_picture(picture, factor), (lefts[index % groups] + column * (width + GUTTER), top))
    return canvas


def _draw_titles(canvas: Image.Image, titles: Sequence[str], lefts: Sequence[int], width: int) -> None:
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(TITLE_SIZE)
    for left in lefts:
        for column, title in enumerate(titles):
            middle = left + column * (width + GUTTER) + width / 2
            draw.text((middle, MARGIN + TITLE_HEIGHT / 2 - 3), title, fill=INK, font=font, anchor="mm")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG in one go, making its directory."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())


def gallery_path(run_dir: Path, step: int) -> Path:
    """Where the pictures of a validation at `step` belong; `reports/page.py` collects them."""
    return run_dir / "gallery" / f"step_{step:08d}.png"
