"""Crops and resampling, against the published distribution and torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from simmim_scale.data.random import DrawnAhead
from simmim_scale.data.transforms import CROP_DRAWS, Crop, centre_crop, resize_crop, sample_crop

SIMMIM = {"scale": (0.67, 1.0), "ratio": (0.75, 4 / 3)}


def inside(crop, height, width):
    return crop.top >= 0 and crop.left >= 0 and crop.top + crop.height <= height and crop.left + crop.width <= width


@given(height=st.integers(1, 600), width=st.integers(1, 600), seed=st.integers(0, 1000))
def test_crops_lie_inside(height, width, seed):
    crop = sample_crop(np.random.default_rng(seed), height, width, **SIMMIM)
    assert crop.height > 0
    assert crop.width > 0
    assert inside(crop, height, width)


def test_crops_follow_the_recipe():
    rng = np.random.default_rng(0)
    crops = [sample_crop(rng, 400, 400, scale=(0.2, 0.6), ratio=(0.75, 4 / 3)) for _ in range(4000)]
    area = np.array([crop.height * crop.width for crop in crops]) / 400**2
    aspect = np.log([crop.width / crop.height for crop in crops])
    assert area.min() > 0.195
    assert area.max() < 0.605
    assert abs(area.mean() - 0.4) < 0.01  # uniform
    assert abs(area.std() - 0.4 / 12**0.5) < 0.01
    assert abs(aspect.mean()) < 0.02  # log-uniform
    assert abs(aspect.std() - 2 * np.log(4 / 3) / 12**0.5) < 0.01
    tops = np.array([crop.top / (400 - crop.height) for crop in crops])
    assert abs(tops.mean() - 0.5) < 0.02
    assert abs(tops.std() - 1 / 12**0.5) < 0.02


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 100, (10, 13)), (100, 10, (13, 10)), (1, 50, (1, 1))])
def test_long_images_fall_back_to_the_largest_centred_crop(height, width, expected):
    crop = sample_crop(np.random.default_rng(0), height, width, **SIMMIM)
    assert (crop.height, crop.width) == expected
    assert abs(2 * crop.top + crop.height - height) <= 1
    assert abs(2 * crop.left + crop.width - width) <= 1


@given(height=st.integers(1, 400), width=st.integers(1, 400), aspect=st.floats(0.2, 5))
def test_centre_crops_touch_two_borders(height, width, aspect):
    crop = centre_crop(height, width, aspect=aspect)
    assert inside(crop, height, width)
    assert crop.height == height or crop.width == width
    assert crop.height == max(1, min(height, round(width / aspect)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", [Crop(0, 0, 60, 80), Crop(7, 11, 41, 53), Crop(3, 5, 9, 12)])
def test_resampling_is_torchvision_s(make_picture, interpolation, channels, crop):
    image = np.ascontiguousarray(make_picture(1, height=60, width=80)[..., :channels])
    result = resize_crop(image, crop, size=(32, 24), interpolation=interpolation)
    assert result.shape == (channels, 32, 24)
    assert result.dtype == torch.uint8
    planar = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    mode = InterpolationMode(interpolation)
    expected = tv.resized_crop(
        planar,
        crop.top,
        crop.left,
        crop.height,
        crop.width,
        [32, 24],
        interpolation=mode,
        antialias=True,
    )
    assert (result.int() - expected.int()).abs().max() <= 1


def test_colour_images_leave_with_channels_last(make_picture):
    result = resize_crop(make_picture(1), Crop(0, 0, 40, 56), size=(16, 16))
    assert result.stride() == (1, 16 * 3, 3)


def test_resampling_is_antialiased():
    # One-pixel stripes average out when made four times smaller; taking every fourth pixel would leave them black or white.
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    result = resize_crop(stripes, Crop(0, 0, 64, 64), size=(16, 16))
    assert (result.float() - 127.5).abs().max() < 20


@given(height=st.integers(1, 600), width=st.integers(1, 600), seed=st.integers(0, 2**32))
def test_crops_are_the_same_from_numbers_drawn_ahead(height, width, seed):
    one_by_one = np.random.default_rng(seed)
    ahead = DrawnAhead(np.random.default_rng(seed), CROP_DRAWS + 1)
    expected = sample_crop(one_by_one, height, width, **SIMMIM)
    assert sample_crop(ahead, height, width, **SIMMIM) == expected
    assert ahead.random() == one_by_one.random()
