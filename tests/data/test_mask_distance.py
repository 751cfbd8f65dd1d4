"""AvgDist: the published values, a brute-force computation, and the way back from a distance to a setting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim_scale.data.mask_distance import (
    average_distance,
    cells_of,
    figure_settings,
    mask_grid,
    setting_distance,
    solve_ratio,
)
from simmim_scale.data.masks import num_hidden


def brute_force(mask: np.ndarray, cell: int) -> float:
    hidden = np.kron(mask, np.ones((cell, cell), bool))
    inside, outside = np.argwhere(hidden), np.argwhere(~hidden)
    return float(np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(-1).min(1)).mean())


@settings(max_examples=60)
@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(2, 5), cell=st.integers(1, 4))
def test_equals_a_search_over_all_pairs_of_pixels(data, rows, columns, cell):
    cells = rows * columns
    hidden = data.draw(st.sets(st.integers(0, cells - 1), min_size=1, max_size=cells - 1))
    mask = np.zeros(cells, bool)
    mask[list(hidden)] = True
    mask = mask.reshape(rows, columns)
    assert average_distance(mask, cell) == pytest.approx(brute_force(mask, cell), abs=1e-9)


# S figure 1 at 192 x 192, read from the distance transform of exact masks.
@pytest.mark.parametrize(
    ("cell", "ratio", "published"), [(32, 0.6, 15.2), (16, 0.8, 12.4), (8, 0.9, 9.8), (64, 0.1, 17.1), (4, 0.9, 5.0)]
)
def test_published_settings(cell, ratio, published):
    distance = setting_distance(image_size=(192, 192), cell=cell, ratio=ratio, samples=400 if cell < 32 else 1000)
    error = distance.spread / np.sqrt(400 if cell < 32 else 1000)
    assert distance.mean == pytest.approx(published, abs=0.2 + 2 * error)


def test_distance_grows_with_the_ratio_and_the_cell():
    means = [setting_distance(image_size=(64, 64), cell=8, ratio=ratio, samples=40).mean for ratio in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert means == sorted(means)
    by_cell = [setting_distance(image_size=(64, 64), cell=cell, ratio=0.5, samples=40).mean for cell in (2, 4, 8, 16)]
    assert by_cell == sorted(by_cell)


@pytest.mark.parametrize("sampler", ["random", "block", "square"])
def test_the_way_back_finds_a_setting_with_the_distance(sampler):
    found = solve_ratio(6.0, image_size=(96, 96), cell=8, sampler=sampler, samples=40)
    again = setting_distance(image_size=(96, 96), cell=8, ratio=found.ratio, sampler=sampler, samples=40)
    assert again.mean == pytest.approx(found.distance.mean)  # the printed ratio hides the very count that was measured
    cells = 12 * 12
    count = num_hidden((12, 12), found.ratio)
    for neighbour in (count - 1, count + 1):
        other = setting_distance(image_size=(96, 96), cell=8, ratio=(neighbour - 0.5) / cells, sampler=sampler, samples=40)
        assert abs(other.mean - 6.0) >= abs(found.distance.mean - 6.0) - 0.25  # sampling may swap neighbours


def test_the_figure_has_every_cell_that_fits():
    assert cells_of((192, 192), 4) == [4, 8, 16, 32, 64]
    assert cells_of((224, 224), 16) == [16, 32]
    settings_ = list(figure_settings((192, 192)))
    assert len(settings_) == 7 * 9 - 1  # nine cells of 64 pixels at ratio .9 are all hidden
    assert ("random", 64, 0.9) not in settings_


def test_wrong_arguments():
    with pytest.raises(ValueError, match="hides every cell"):
        average_distance(np.ones((2, 2), bool), 4)
    with pytest.raises(ValueError, match="hides no cell"):
        average_distance(np.zeros((2, 2), bool), 4)
    with pytest.raises(ValueError, match=r"must divide the image, got a cell of 20 for 192x192"):
        mask_grid((192, 192), 20)
    with pytest.raises(ValueError, match="positive number of pixels, got -1"):
        solve_ratio(-1.0, image_size=(64, 64), cell=8)
    with pytest.raises(ValueError, match="at least two cells"):
        solve_ratio(5.0, image_size=(64, 64), cell=64)
