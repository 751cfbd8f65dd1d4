"""The objective against the published formulas, written out plainly here."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from simmim_scale.objectives.simmim import SimMIM


def make_batch(b: int = 3, h: int = 32, w: int = 48, c: int = 3, cell: int = 8, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (b, c, h, w), dtype=torch.uint8, generator=generator),
        "mask": torch.rand((b, h // cell, w // cell), generator=generator) < 0.6,
    }


def published(module: SimMIM, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, prediction) by the published lines: products with the mask, a 1x1 convolution, pixel shuffle. `mask` is per
    patch."""
    w = mask.unsqueeze(-1).to(image.dtype)
    x = module.backbone.embed(image)
    x = x * (1 - w) + module.mask_token.token.expand_as(x) * w
    z = module.backbone.encode(x).permute(0, 3, 1, 2)
    weight = module.head.proj.weight[:, :, None, None]
    prediction = F.pixel_shuffle(F.conv2d(z, weight, module.head.proj.bias), module.backbone.stride)
    m = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    m = m[:, :, : image.shape[2], : image.shape[3]].to(image.dtype)
    prediction = prediction[:, :, : image.shape[2], : image.shape[3]]
    error = F.l1_loss(image, prediction, reduction="none")
    return (error * m).sum() / (m.sum() + 1e-5) / image.shape[1], prediction


def normalised(module: SimMIM, image: Tensor) -> Tensor:
    mean = torch.tensor(module.pixel_norm.mean).view(1, -1, 1, 1)
    std = torch.tensor(module.pixel_norm.std).view(1, -1, 1, 1)
    return (image.float() / 255 - mean) / std


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_loss_and_gradients_equal_the_published_formula(make_simmim, in_chans):
    module, batch = make_simmim(in_chans=in_chans), make_batch(c=in_chans, cell=4)
    loss = module(batch)["loss"]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    expected, _ = published(module, normalised(module, batch["image"]), batch["mask"])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, parameter in module.named_parameters():
        assert gradients[name].abs().sum() > 0, name
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_training_returns_the_loss_alone_and_eval_the_prediction_too(make_simmim):
    module, batch = make_simmim(), make_batch()
    assert set(module(batch)) == {"loss"}
    parts = module.eval()(batch)
    assert set(parts) == {"loss", "loss_per_sample", "prediction"}
    assert parts["prediction"].shape == batch["image"].shape
    assert parts["loss"].dtype == torch.float32
    assert parts["loss"].ndim == 0


def test_a_float_image_is_taken_as_normalised(make_simmim):
    module, batch = make_simmim().eval(), make_batch()
    raw = module(batch)
    ready = module({**batch, "image": normalised(module, batch["image"])})
    torch.testing.assert_close(raw["loss"], ready["loss"])


@pytest.mark.parametrize("size", [(30, 45), (33, 48), (4, 4), (1, 7)])
def test_sizes_that_do_not_divide_are_cropped(make_simmim, size):
    module = make_simmim().eval()
    h, w = size
    image = torch.randint(0, 256, (2, 3, h, w), dtype=torch.uint8)
    mask = torch.rand(2, -(-h // 4), -(-w // 4)) < 0.5
    mask[:, 0, 0] = True
    parts = module({"image": image, "mask": mask})
    loss, prediction = published(module, normalised(module, image), mask)
    assert parts["prediction"].shape == image.shape
    torch.testing.assert_close(parts["prediction"], prediction)
    torch.testing.assert_close(parts["loss"], loss)


def test_every_grid_of_the_same_mask_gives_the_same_loss(make_simmim):
    module, batch = make_simmim().eval(), make_batch(cell=16)
    coarse = module(batch)["loss"]
    for times in (2, 4):
        finer = batch["mask"].repeat_interleave(times, 1).repeat_interleave(times, 2)
        assert module({**batch, "mask": finer})["loss"] == coarse


def test_hidden_pixels_do_not_reach_the_prediction(make_simmim):
    module, batch = make_simmim().eval(), make_batch()
    hidden = batch["mask"].repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(hidden, 255 - batch["image"], batch["image"])
    assert torch.equal(module(batch)["prediction"], module({**batch, "image": other})["prediction"])


def test_flip_mirrors_only_the_flagged_images_and_not_the_mask(make_simmim):
    module, batch = make_simmim().eval(), make_batch()
    flip = torch.tensor([True, False, True])
    image = batch["image"].clone()
    image[flip] = image[flip].flip(-1)
    expected = module({**batch, "image": image})
    actual = module({**batch, "flip": flip})
    assert torch.equal(actual["prediction"], expected["prediction"])
    assert torch.equal(actual["loss"], expected["loss"])


def test_losses_per_sample_are_those_of_single_batches_and_padding_has_no_part(make_simmim):
    module, batch = make_simmim().eval(), make_batch(b=4)
    single = torch.stack([module({k: v[i : i + 1] for k, v in batch.items()})["loss"] for i in range(4)])
    valid = torch.tensor([True, True, False, True])
    dirty = normalised(module, batch["image"])
    dirty[2] = float("nan")
    parts = module({**batch, "image": dirty, "valid": valid})
    torch.testing.assert_close(parts["loss_per_sample"][valid], single[valid])
    assert parts["loss_per_sample"][2] == 0
    kept = module({k: v[valid] for k, v in batch.items()})
    torch.testing.assert_close(parts["loss"], kept["loss"])


def test_drop_path_depends_on_seed_and_position_alone(make_simmim):
    module = make_simmim(drop_path=0.5, seed=3)
    batch = {**make_batch(b=16), "position": torch.arange(100, 116)}
    torch.manual_seed(1)
    first = module(batch)["loss"]
    torch.manual_seed(2)
    assert torch.equal(first, module(batch)["loss"])
    assert not torch.equal(first, module({**batch, "position": torch.arange(200, 216)})["loss"])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = module({k: v[order] for k, v in batch.items()})["loss"]
    torch.testing.assert_close(first, shuffled)
    module.eval()
    without = {k: v for k, v in batch.items() if k != "position"}
    assert torch.equal(module(batch)["loss"], module(without)["loss"])


def test_an_image_without_masked_pixels_has_loss_zero(make_simmim):
    module, batch = make_simmim(), make_batch()
    batch["mask"][:] = False
    loss = module(batch)["loss"]
    loss.backward()
    assert loss == 0
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_init_sets_every_parameter_and_is_a_function_of_the_seed(make_simmim):
    module = make_simmim(seed=5)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    module.init_weights(torch.Generator().manual_seed(5))
    again = make_simmim(seed=5).state_dict()
    for name, value in module.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, again[name]), name
    assert module.mask_token.token.std() < 0.06


def test_bf16_parameters_compute_in_bf16_and_sum_in_fp32(make_simmim):
    module, batch = make_simmim(), make_batch()
    exact = module(batch)["loss"]
    rounded = module.bfloat16()(batch)["loss"]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
    assert module.pixel_norm(batch["image"]).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(3, 5, 6, dtype=torch.bool)}, "grid of 5 along the height"),
        ({"mask": torch.ones(3, 16, 12, dtype=torch.bool)}, "grid of 16 along the height"),
        ({"mask": torch.ones(2, 4, 6, dtype=torch.bool)}, "batch of 3"),
        ({"image": torch.zeros(3, 1, 32, 48)}, r"expected \(batch, 3, height, width\)"),
        ({"image": torch.zeros(3, 3, 32, 48, dtype=torch.int64)}, "expected uint8"),
    ],
)
def test_a_batch_that_does_not_fit_is_a_clear_error(make_simmim, change, message):
    with pytest.raises(ValueError, match=message):
        make_simmim()({**make_batch(), **change})


def test_a_batch_without_a_mask_says_what_is_missing(make_simmim):
    with pytest.raises(ValueError, match="'mask'"):
        make_simmim()({"image": make_batch()["image"]})
