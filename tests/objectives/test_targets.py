"""The norm-target against a float64 brute force over windows, and its way back to pixels."""

import numpy as np
import pytest
import torch

from simmim_scale.objectives.pixel_target import Pixels
from simmim_scale.objectives.prediction import Pictures
from simmim_scale.objectives.statistics import norm_target


def brute_force(image: np.ndarray, window: int) -> np.ndarray:
    """(c, h, w) -> normalised by the mean and unbiased variance of each pixel's window, cut at the border; float64."""
    c, h, w = image.shape
    result, r = np.empty((c, h, w)), window // 2
    for y in range(h):
        for x in range(w):
            part = image[:, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1].astype(np.float64).reshape(c, -1)
            variance = part.var(axis=1, ddof=1)
            result[:, y, x] = (image[:, y, x] - part.mean(axis=1)) / np.sqrt(variance + 1e-6)
    return result


@pytest.mark.parametrize(("size", "window"), [((24, 24), 7), ((20, 31), 47), ((33, 10), 9)])
def test_norm_target_equals_the_brute_force(size, window):
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = np.stack([brute_force(one, window) for one in image.numpy()])
    np.testing.assert_allclose(norm_target(image, window).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_norm_target_is_exact_where_the_picture_is_flat():
    # One grey level apart on white: in fp32 the variance would be lost in the cancellation.
    grey = torch.full((1, 1, 24, 24), 250.0)
    grey[..., 12, 12] = 251.0
    image = (grey / 255 - 0.45) / 0.225
    expected = brute_force(image[0].numpy(), 15)
    np.testing.assert_allclose(norm_target(image, 15)[0].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_norm_target_is_its_own_for_every_image_and_size():
    target = Pixels(in_chans=1, norm_window=5)
    images = [torch.randn(2, 1, 12, 16), torch.randn(1, 1, 16, 12), torch.randn(2, 1, 12, 16)]
    for image in images:
        assert torch.equal(target(image), norm_target(image, 5))
        assert torch.equal(target(image)[:1], target(image[:1]))


@pytest.mark.parametrize("window", [None, 5, 47])
def test_to_pixels_inverts_the_target(window):
    target = Pixels(in_chans=3, norm_window=window)
    image = torch.randn(2, 3, 20, 28)
    pictures = Pictures(image=image, stored=image, flip=None, constants=None)
    torch.testing.assert_close(target.to_pixels(target(image), pictures), image, rtol=1e-5, atol=1e-5)


def test_a_single_pixel_is_finite():
    assert torch.isfinite(norm_target(torch.ones(1, 3, 1, 1), 47)).all()
