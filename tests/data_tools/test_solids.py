"""Distances never overestimate, so that tracing finds every surface; traced balls are round."""

import numpy as np
import pytest

from data_tools.synth import solids
from data_tools.synth.solids import REACH, SOLIDS, trace, turn

POSE = turn(0, 0.4) @ turn(1, 0.7)


@pytest.mark.parametrize("kind", sorted(SOLIDS))
def test_distance_grows_no_faster_than_the_way(kind: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(5):
        distance = SOLIDS[kind].sample(np.random.default_rng(seed))
        first = rng.uniform(-1.2, 1.2, (3, 4000)).astype(np.float32)
        step = rng.normal(0, 0.02, first.shape).astype(np.float32)
        change = np.abs(distance(*(first + step)) - distance(*first)) / np.sqrt((step**2).sum(0))
        assert np.quantile(change, 0.99) < 1.1


@pytest.mark.parametrize("kind", sorted(SOLIDS))
def test_body_lies_within_reach(kind: str) -> None:
    direction = np.random.default_rng(1).normal(size=(3, 2000)).astype(np.float32)
    direction *= REACH / np.sqrt((direction**2).sum(0))
    for seed in range(10):
        assert SOLIDS[kind].sample(np.random.default_rng(seed))(*direction).min() > 0


def test_ball_is_round_with_normals_along_its_radius() -> None:
    hits = trace(SOLIDS["ball"].sample(np.random.default_rng(0)), POSE, side=150, scale=50)
    assert hits.coverage.sum() == pytest.approx(np.pi * 50**2, rel=0.04)  # edges soften outwards, by less than a pixel
    inner = hits.coverage == 1
    np.testing.assert_allclose(hits.normal[:, inner], (POSE @ hits.point)[:, inner], atol=0.02)
    np.testing.assert_allclose(np.sqrt((hits.point[:, inner] ** 2).sum(0)), 1, atol=0.02)


@pytest.mark.parametrize("kind", sorted(SOLIDS))
def test_travelling_in_blocks_finds_what_single_rays_find(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    distance = SOLIDS[kind].sample(np.random.default_rng(2))
    blocks = trace(distance, POSE, side=101, scale=39)
    monkeypatch.setattr(solids, "_BLOCK", 1)
    single = trace(distance, POSE, side=101, scale=39)
    covered = [np.zeros(101 * 101), np.zeros(101 * 101)]
    for mask, hits in zip(covered, (blocks, single), strict=True):
        mask[hits.pixel] = hits.coverage
    assert np.mean(np.abs(covered[0] - covered[1]) > 0.3) < 0.003


def test_turn_is_a_rotation() -> None:
    for axis in range(3):
        matrix = turn(axis, 0.8)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
        assert np.linalg.det(matrix) == pytest.approx(1, abs=1e-6)
