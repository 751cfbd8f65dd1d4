"""A picture of one's own, of any size, through a small model, to a PNG."""

import numpy as np
import pytest
import torch
from PIL import Image

from simmim_scale.config.schema import Config
from simmim_scale.models.weights import save_weights
from simmim_scale.objectives.simmim import build_simmim
from simmim_scale.tasks.reconstruct import reconstruct, reconstruction_rows

MODEL = {"name": "swin_v2", "image_size": (64, 96), "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


@pytest.fixture
def make_weights(tmp_path):
    def make(norm_target_window=None, **model):
        config = Config(model={**MODEL, **model}, mask={"cell": 16}, objective={"norm_target_window": norm_target_window})
        module = build_simmim(config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=0)
        return save_weights(tmp_path / "weights", module.state_dict(), config.model_dump(mode="json"))

    return make


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.mark.parametrize("window", [None, 7])
def test_a_picture_of_another_size_and_shape_is_drawn(make_weights, photo, tmp_path, window):
    result = reconstruct(make_weights(window), photo, tmp_path / "sub" / "r.png", seed=3)
    assert (result.hidden, result.cells) == (15, 24)
    assert result.local_statistics == (window is not None)
    assert result.loss > 0
    with Image.open(result.path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 3 * 96


def test_the_seed_decides_the_mask(make_weights, photo, tmp_path):
    weights = make_weights()
    losses = [reconstruct(weights, photo, tmp_path / f"{number}.png", seed=seed).loss for number, seed in enumerate((1, 1, 2))]
    assert losses[0] == losses[1] != losses[2]
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_mask_options_replace_those_of_training(make_weights, photo, tmp_path):
    result = reconstruct(make_weights(), photo, tmp_path / "r.png", ratio=0.25, cell=8, sampler="square")
    assert (result.hidden, result.cells) == (24, 96)


@pytest.mark.parametrize(
    ("options", "message"), [({"cell": 20}, "must divide"), ({"ratio": 1.5}, "ratio"), ({"sampler": "stripes"}, "sampler")]
)
def test_masks_that_do_not_fit_are_user_errors(make_weights, photo, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(make_weights(), photo, tmp_path / "r.png", **options)
    assert not (tmp_path / "r.png").exists()


def test_unreadable_pictures_are_user_errors(make_weights, tmp_path):
    weights = make_weights()
    with pytest.raises(ValueError, match="cannot read"):
        reconstruct(weights, tmp_path / "nowhere.jpg", tmp_path / "r.png")
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be decoded"):
        reconstruct(weights, tmp_path / "text.jpg", tmp_path / "r.png")


def test_visible_cells_show_the_original_and_hidden_ones_the_prediction(make_weights):
    config = Config(model=MODEL, mask={"cell": 16})
    module = build_simmim(config.model, config.objective, mean=config.data.mean, std=config.data.std, seed=0).eval()
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 1, 2] = True
    with torch.no_grad():
        white = (1 - torch.tensor(config.data.mean)) / torch.tensor(config.data.std)
        rows = reconstruction_rows(module, {"image": image, "mask": mask}, white.view(1, 3, 1, 1).expand(1, 3, 64, 96))
    original, masked, predicted = rows[0]
    assert np.array_equal(original, image[0].permute(1, 2, 0).numpy())
    assert (predicted[16:32, 32:48] == 255).all()
    outside = np.ones((64, 96), dtype=bool)
    outside[16:32, 32:48] = False
    assert np.array_equal(predicted[outside], original[outside])
    assert np.array_equal(masked[outside], original[outside])
    assert (masked[~outside] != original[~outside]).any()
