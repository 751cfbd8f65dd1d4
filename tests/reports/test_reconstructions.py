"""Pictures: every pixel of every input is where the layout says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim_scale.reports.reconstructions import (
    GROUP_GUTTER,
    GUTTER,
    MARGIN,
    TITLE_HEIGHT,
    draw_reconstructions,
    fill_hidden,
    gallery_path,
    hide,
    save_picture,
)


def pictures(count: int, height: int, width: int, channels: int = 3) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, 256, (height, width, channels), dtype=np.uint8) for _ in range(3)) for _ in range(count)]


def test_pictures_are_pasted_unchanged() -> None:
    rows = pictures(3, 200, 170)
    drawn = np.asarray(draw_reconstructions(rows))
    for index, row in enumerate(rows):
        for column, picture in enumerate(row):
            top, left = MARGIN + TITLE_HEIGHT + index * (200 + GUTTER), MARGIN + column * (170 + GUTTER)
            assert np.array_equal(drawn[top : top + 200, left : left + 170], picture)


def test_small_pictures_are_enlarged_by_repetition_and_stand_in_two_groups() -> None:
    rows = pictures(5, 64, 96)
    drawn = np.asarray(draw_reconstructions(rows))
    left = MARGIN + 3 * 288 + 2 * GUTTER + GROUP_GUTTER  # the second group; 64 pixels become 192
    top = MARGIN + TITLE_HEIGHT
    assert np.array_equal(drawn[top : top + 192 : 3, left : left + 288 : 3], rows[1][0])
    assert drawn.shape == (MARGIN + TITLE_HEIGHT + 3 * 192 + 2 * GUTTER + MARGIN, left + 3 * 288 + 2 * GUTTER + MARGIN, 3)


def test_gray_pictures_and_own_titles() -> None:
    rows = [row[:2] for row in pictures(1, 160, 160, 1)]
    drawn = np.asarray(draw_reconstructions(rows, ("input", "output")))
    inside = drawn[MARGIN + TITLE_HEIGHT : MARGIN + TITLE_HEIGHT + 160, MARGIN : MARGIN + 160]
    assert np.array_equal(inside, np.repeat(rows[0][0], 3, axis=2))
    assert (drawn[MARGIN : MARGIN + TITLE_HEIGHT] < 200).any()  # titles are written


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([pictures(1, 8, 8)[0][:2]], "one picture per title"),
        ([pictures(1, 8, 8)[0], pictures(1, 8, 16)[0]], "pictures of one size"),
        ([tuple(np.zeros((8, 8, 3)) for _ in range(3))], "uint8"),
        ([tuple(np.zeros((8, 8, 4), np.uint8) for _ in range(3))], "uint8"),
    ],
)
def test_wrong_rows_are_errors(rows: list[tuple[np.ndarray, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_reconstructions(rows)


def test_hide_and_fill_follow_the_mask() -> None:
    (image, prediction, _) = pictures(1, 6, 9)[0]
    mask = np.array([[True, False, False], [False, False, True]])
    hidden, filled = hide(image, mask), fill_hidden(image, prediction, mask)
    assert len(np.unique(hidden[:3, :3].reshape(-1, 3), axis=0)) == 1
    assert np.array_equal(hidden[:3, 3:], image[:3, 3:])
    assert np.array_equal(filled[3:, 6:], prediction[3:, 6:])
    assert np.array_equal(filled[3:, :6], image[3:, :6])
    assert hidden.dtype == filled.dtype == np.uint8
    with pytest.raises(ValueError, match="divides the picture"):
        hide(image, np.ones((4, 3), bool))


def test_saving_makes_the_directory(tmp_path: Path) -> None:
    path = gallery_path(tmp_path, 120)
    save_picture(Image.new("RGB", (3, 2), (1, 2, 3)), path)
    assert path == tmp_path / "gallery" / "step_00000120.png"
    assert Image.open(path).getpixel((0, 0)) == (1, 2, 3)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
