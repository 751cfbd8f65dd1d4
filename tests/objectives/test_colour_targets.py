"""Down-sampled pixels, colour bins and clusters against independent arithmetic, and their way back to pixels."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from simmim_scale.objectives.colour_targets import Bins, Clusters, read_centres
from simmim_scale.objectives.pixel_target import Pixels
from simmim_scale.objectives.pixels import PixelNorm
from simmim_scale.objectives.prediction import Hidden, Pictures

NORM = PixelNorm((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def make_pictures(size=(16, 24), *, flip=True, floating=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=generator)
    stored[0, :, :2] = torch.tensor([0, 255])[:, None]  # both ends of the range
    flags = torch.tensor([True, False, True]) if flip else None
    flipped = stored if flags is None else torch.where(flags[:, None, None, None], stored.flip(3), stored)
    image = NORM(flipped)
    pictures = Pictures(image=image, stored=image if floating else stored, flip=None if floating else flags, constants=None)
    return pictures, flipped.numpy().astype(np.int64)


def block_sums(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Sums over squares, whole numbers."""
    b, c, h, w = pixels.shape
    return sum(pixels[:, :, i::scale, j::scale] for i in range(scale) for j in range(scale)).reshape(b, c, h // scale, w // scale)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_downsampled_pixels_are_the_mean_of_squares(scale):
    pictures, pixels = make_pictures()
    target = Pixels(in_chans=3, norm_window=None, scale=scale)(pictures.image)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (NORM.mean, NORM.std))
    np.testing.assert_allclose(target, (block_sums(pixels, scale) / scale**2 / 255 - mean) / std, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bins", [2, 4, 8, 16, 32, 256])
@pytest.mark.parametrize("scale", [1, 4, 8])
def test_bins_are_those_of_whole_numbers(bins, scale):
    pictures, pixels = make_pictures()
    labels = Bins(in_chans=3, bins=bins, scale=scale, norm=NORM, logits_mib=1).labels(pictures)
    expected = np.minimum(block_sums(pixels, scale) * bins // (255 * scale**2), bins - 1)
    assert np.array_equal(labels.numpy(), expected)
    if scale == 1:
        assert np.array_equal(labels.numpy(), pixels * bins // 256)  # equal bins of the 256 values


def test_a_normalised_picture_has_the_bins_of_its_bytes_but_for_rounding():
    pictures, pixels = make_pictures(floating=True)
    labels = Bins(in_chans=3, bins=8, scale=1, norm=NORM, logits_mib=1).labels(pictures).numpy()
    inner = pixels % 32 > 0
    assert np.array_equal(labels[inner], (pixels * 8 // 256)[inner])
    assert np.abs(labels - pixels * 8 // 256).max() <= 1


@pytest.mark.parametrize("scale", [1, 4])
def test_clusters_are_the_nearest_centres(scale):
    pictures, pixels = make_pictures()
    centres = np.random.default_rng(1).uniform(-1, 1, (37, 3)).astype(np.float32)
    target = Clusters(centres=centres, scale=scale, norm=NORM, logits_mib=1)
    labels = target.labels(pictures)
    colours = (block_sums(pixels, scale) / scale**2 / 127.5 - 1).transpose(0, 2, 3, 1)
    nearest = cdist(colours.reshape(-1, 3), centres).argmin(1).reshape(colours.shape[:3])
    assert np.array_equal(labels[:, 0].numpy(), nearest)
    drawn = NORM.invert(target.to_pixels(labels, pictures)).numpy()[:, :, ::scale, ::scale]
    np.testing.assert_allclose(drawn, ((centres[nearest] + 1) * 127.5).transpose(0, 3, 1, 2), atol=0.51)


def test_bins_are_drawn_in_the_middle():
    pictures, pixels = make_pictures()
    target = Bins(in_chans=3, bins=32, scale=1, norm=NORM, logits_mib=1)
    drawn = NORM.invert(target.to_pixels(target.labels(pictures), pictures)).numpy().astype(int)
    assert np.abs(drawn - pixels).max() <= 5


def test_the_baseline_is_the_entropy_of_visible_colours():
    pictures, pixels = make_pictures(flip=False)
    target = Bins(in_chans=3, bins=4, scale=8, norm=NORM, logits_mib=1)
    mask = torch.tensor([[[True, False, False], [False, True, False]]] * 3)
    sums = target.baseline(pictures, Hidden(mask, cell=1, size=(2, 3)))
    labels = np.minimum(block_sums(pixels, 8) * 4 // (255 * 64), 3)
    hidden = mask[0].numpy()
    for row in range(3):
        error = 0.0
        for channel in labels[row]:
            frequency = (np.bincount(channel[~hidden], minlength=4) + 0.25) / 5
            error -= np.log(frequency[channel[hidden]]).sum()
        assert sums.error[row].item() == pytest.approx(error, rel=1e-5)
    assert sums.count.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((512, 4)), r"shape \(512, 4\), expected \(centres, 3\)"),
        (np.zeros((1, 3)), "shape"),
        (np.full((8, 3), 200.0), "outside of"),
        (np.full((8, 3), np.nan), "outside of"),
        (np.array([{"no": "numbers"}]), "cannot read"),
    ],
)
def test_centres_of_the_wrong_shape_are_refused(tmp_path, array, message):
    np.save(tmp_path / "centres.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_centres(tmp_path / "centres.npy")
    with pytest.raises(ValueError, match="cannot read"):
        read_centres(tmp_path / "none.npy")
