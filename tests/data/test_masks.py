"""Mask samplers: exact counts on any grid, shapes as named, fair placement."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import label

from simmim_scale.data.masks import SAMPLERS, num_hidden, sample_mask
from simmim_scale.data.random import Stream, sample_rng


def draw(sampler, *, grid=(6, 6), ratio=0.6, sample=0):
    return sample_mask(sample_rng(0, 0, sample, Stream.MASK), grid=grid, ratio=ratio, sampler=sampler)


@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    ratio=st.floats(0.01, 0.99),
    sample=st.integers(0, 100),
)
def test_every_mask_hides_exactly_the_count(sampler, grid, ratio, sample):
    mask = draw(sampler, grid=grid, ratio=ratio, sample=sample)
    assert mask.shape == grid
    assert mask.dtype == bool
    assert mask.sum() == num_hidden(grid, ratio)


def test_published_counts():
    assert num_hidden((6, 6), 0.6) == 22  # recipes: ceil(36 * .6) at 192 px
    assert num_hidden((24, 24), 0.9) == 519
    assert num_hidden((10, 10), 0.07) == 7  # 100 * .07 is a hair above 7 in floating point
    assert num_hidden((1, 1), 0.5) == 1


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_masks_repeat_with_the_seed_and_differ_between_samples(sampler):
    masks = [draw(sampler, sample=sample) for sample in range(20)]
    assert np.array_equal(masks[3], draw(sampler, sample=3))
    assert len({mask.tobytes() for mask in masks}) > 15


def test_random_cells_are_equally_likely():
    hidden = np.mean([draw("random", sample=sample) for sample in range(3000)], axis=0)
    # 22 / 36 = .611 with a standard error of .009.
    assert np.abs(hidden - 22 / 36).max() < 0.04


def test_block_masks_are_connected_pieces_and_random_ones_are_not():
    def edges(sampler):
        masks = [draw(sampler, grid=(14, 14), ratio=0.4, sample=sample) for sample in range(40)]
        return np.mean([(mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum() for mask in masks])

    assert edges("block") < edges("random") / 2
    assert edges("square") < edges("block")


@pytest.mark.parametrize(("grid", "ratio", "side"), [((6, 6), 0.6, 4), ((6, 6), 0.25, 3), ((4, 12), 0.5, 4), ((1, 9), 0.5, 1)])
def test_square_masks_hold_a_whole_square_and_stay_in_one_piece(grid, ratio, side):
    for sample in range(20):
        mask = draw("square", grid=grid, ratio=ratio, sample=sample)
        _, pieces = label(mask)
        windows = np.lib.stride_tricks.sliding_window_view(mask, (side, side))
        assert pieces == 1
        assert windows.all(axis=(2, 3)).any()


def test_squares_lie_everywhere():
    hidden = np.mean([draw("square", ratio=0.25, sample=sample) for sample in range(400)], axis=0)
    assert hidden.min() > 0.02
    assert np.abs(hidden - hidden[::-1]).max() < 0.12
    assert np.abs(hidden - hidden.T).max() < 0.12


def test_wrong_arguments():
    rng = np.random.default_rng(0)
    for ratio in (0.0, 1.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"mask\.ratio: expected a share between 0 and 1"):
            sample_mask(rng, grid=(6, 6), ratio=ratio)
    with pytest.raises(ValueError, match="at least one cell"):
        sample_mask(rng, grid=(0, 6), ratio=0.5)
    with pytest.raises(ValueError, match=r"expected one of random, block, square, or 'module:attribute', got 'stripes'"):
        sample_mask(rng, grid=(6, 6), ratio=0.5, sampler="stripes")


def test_the_sampler_of_the_readme(tmp_path, monkeypatch, repository):
    code = re.search(r"```python\n(# mymask\.py.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "mymask.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    mask = draw("mymask:around", ratio=0.5)
    assert mask.sum() == 18
    rows, columns = np.nonzero(mask)
    hidden = np.hypot(rows - rows.mean(), columns - columns.mean()).mean()
    assert hidden < 1.77, "18 cells around one point, not all over the 6 x 6"


def test_a_sampler_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "stripes_of_mine.py").write_text(
        "import numpy as np\n"
        "def top(rng, grid, count):\n"
        "    mask = np.zeros(grid, bool)\n"
        "    mask.reshape(-1)[:count] = True\n"
        "    return mask\n"
        "def more(rng, grid, count):\n"
        "    return np.ones(grid, bool)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mask = draw("stripes_of_mine:top", ratio=0.5)
    assert mask[:3].all()
    assert not mask[3:].any()
    with pytest.raises(
        ValueError, match=r"stripes_of_mine:more must return a bool array of shape \(6, 6\) with exactly 18 True, got bool of"
    ):
        draw("stripes_of_mine:more", ratio=0.5)
    with pytest.raises(ValueError, match=r"has no 'bottom'"):
        draw("stripes_of_mine:bottom")
    with pytest.raises(ValueError, match=r"cannot import 'nomask'"):
        draw("nomask:top")
