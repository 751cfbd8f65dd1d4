"""Curves: thinning keeps mean and range, smoothing does not lag, the SVG stands alone."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim_scale.reports.charts import Curve, draw_chart, smooth, thin


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 3000), points=st.integers(1, 500), seed=st.integers(0, 1000))
def test_thinning_keeps_mean_and_range(count: int, points: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=count)
    values[::7] = np.nan
    steps, mean, low, high = thin(np.arange(count, dtype=float), values, points)
    finite = values[np.isfinite(values)]
    assert len(mean) == min(len(finite), points)
    if len(finite):
        assert low.min() == finite.min()
        assert high.max() == finite.max()
        assert (low <= mean + 1e-12).all()
        assert (mean <= high + 1e-12).all()
        assert (np.diff(steps) > 0).all()


def test_smoothing_keeps_lines_where_they_are() -> None:
    line = np.linspace(2.0, 5.0, 400)
    assert smooth(line)[20:-20] == pytest.approx(line[20:-20])
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise).std() < 0.5 * noise.std()
    assert smooth(np.array([1.0, 3.0])) == pytest.approx([1.0, 3.0])


def test_svg_is_one_element_without_addresses() -> None:
    svg = draw_chart(
        [Curve([1, 2, 3], [1.0, np.nan, 2.0], "a<b"), Curve([1, 2, 3], [3.0, 1.0, 2.0], "c", marked=True)], level=(1.5, "line")
    )
    assert "http" not in svg
    assert "a&lt;b" in svg
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.tag == "svg"
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "height" not in root.attrib


def test_same_curves_give_the_same_bytes() -> None:
    assert draw_chart([Curve([1, 2], [1.0, 2.0])]) == draw_chart([Curve([1, 2], [1.0, 2.0])])


@pytest.mark.parametrize("values", [[], [np.nan, np.nan], [0.0], [5.0, 5.0], [1e-9, 2e-9], [1e9, 2e9]])
def test_odd_curves_are_drawn(values: list[float]) -> None:
    for options in ({}, {"from_zero": True, "percent": True}):
        assert draw_chart([Curve(range(len(values)), values, smoothed=True)], **options).startswith("<svg")
