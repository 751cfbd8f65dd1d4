"""Noise is smooth, periodic and pure."""

import numpy as np

from data_tools.synth.noise import fractal_noise, screen_noise, soft_step, value_noise


def test_value_noise_is_bounded_continuous_and_single_precision() -> None:
    u = np.linspace(-40, 40, 20001, dtype=np.float32)
    noise = value_noise(u, 0.3 * u)
    assert noise.dtype == np.float32
    assert np.abs(noise).max() <= 1.0001
    assert np.abs(np.diff(noise)).max() < 0.03  # steps of 0.004: a jump at a cell's border would be far larger
    assert noise.std() > 0.2


def test_value_noise_repeats_after_its_lattice() -> None:
    u, v = np.random.default_rng(0).uniform(0, 50, (2, 500)).astype(np.float32)
    np.testing.assert_allclose(value_noise(u, v), value_noise(u + 256, v - 256), atol=2e-3)


def test_octaves_finer_than_a_pixel_fade_out() -> None:
    u, v = np.random.default_rng(1).uniform(0, 50, (2, 500)).astype(np.float32)
    assert np.all(fractal_noise(u, v, octaves=3, pixel=4.0) == 0)
    assert fractal_noise(u, v, octaves=3, pixel=0.01).std() > 0.2


def test_screen_noise_follows_its_generator() -> None:
    first = screen_noise(np.random.default_rng(3), 40, 60, 7)
    assert first.shape == (40, 60)
    np.testing.assert_array_equal(first, screen_noise(np.random.default_rng(3), 40, 60, 7))


def test_soft_step_is_half_at_the_edge() -> None:
    np.testing.assert_allclose(soft_step(np.float32([-1, -0.1, 0, 0.1, 1]), 0.4), [0, 0.25, 0.5, 0.75, 1], atol=1e-6)
