"""The classifier's loss against its definition: smoothing, mixup, cutmix, padding."""

import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from simmim_scale.config.schema import SwinV2Config
from simmim_scale.objectives.classifier import build_classifier
from simmim_scale.objectives.mixing import mix_images, smoothed_cross_entropy

MODEL = SwinV2Config(image_size=(16, 16), embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2, drop_path=0.3)


@pytest.fixture
def module():
    return build_classifier(MODEL, num_classes=5, mean=(0.5,) * 3, std=(0.25,) * 3, seed=0, label_smoothing=0.1)


def plan(lam: list[float], box: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"partner": torch.tensor([1, 0, 3, 2]), "mix_lam": torch.tensor(lam), "mix_box": torch.tensor(box)}


EMPTY = [0, 0, 0, 0]


def test_loss_equals_timms_with_and_without_mixing(generator):
    logits = torch.randn(4, 5, generator=generator)
    label = torch.tensor([0, 3, 4, 1])
    found = smoothed_cross_entropy(logits, label, {}, smoothing=0.1).mean()
    assert found == pytest.approx(float(LabelSmoothingCrossEntropy(0.1)(logits, label)), rel=1e-6)
    flipped = {"partner": torch.tensor([3, 2, 1, 0]), "mix_lam": torch.full((4,), 0.3), "mix_box": torch.zeros(4, 4).long()}
    target = mixup_target(label, 5, lam=0.3, smoothing=0.1)
    found = smoothed_cross_entropy(logits, label, flipped, smoothing=0.1).mean()
    assert found == pytest.approx(float(SoftTargetCrossEntropy()(logits, target)), rel=1e-6)


def test_mixup_blends_and_cutmix_covers(generator):
    image = torch.randn(4, 3, 8, 8, generator=generator)
    mixed = mix_images(image, plan([0.25, 0.25, 0.75, 0.75], [EMPTY, EMPTY, [2, 0, 6, 4], [2, 0, 6, 4]]))
    assert torch.allclose(mixed[0], 0.25 * image[0] + 0.75 * image[1])
    assert torch.allclose(mixed[1], 0.25 * image[1] + 0.75 * image[0])
    assert torch.equal(mixed[2][:, 2:6, :4], image[3][:, 2:6, :4])
    assert torch.equal(mixed[2][:, :2], image[2][:, :2])
    assert torch.equal(mixed[2][:, :, 4:], image[2][:, :, 4:])
    assert torch.equal(mix_images(image, plan([1.0] * 4, [EMPTY] * 4)), image)


def test_padding_is_no_part_of_the_loss(module, generator):
    image = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    batch = {"image": image, "label": torch.tensor([0, 1, 2, 3]), "valid": torch.tensor([True, True, True, False])}
    module.eval()
    all_four = module(batch)
    three = module({name: value[:3] for name, value in batch.items()})
    assert torch.allclose(all_four["loss"], three["loss"], rtol=1e-5)
    assert all_four["loss_per_sample"][3] == 0
    expected = torch.nn.functional.cross_entropy(all_four["logits"], batch["label"], reduction="none")
    assert torch.allclose(all_four["loss_per_sample"][:3], expected[:3])


def test_drop_path_follows_the_position_and_training_needs_labels(module, generator):
    image = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    for parameter in module.parameters():  # residual norms start at zero: then dropping a branch would change nothing
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    module.train()
    batch = {"image": image, "label": torch.tensor([0, 1, 2, 3]), "position": torch.arange(4)}
    first = module(batch)["loss"]
    assert module(batch)["loss"] == first
    losses = {module({**batch, "position": batch["position"] + 4 * turn})["loss"].item() for turn in range(8)}
    assert len(losses) > 1
    with pytest.raises(ValueError, match="training needs the key 'label'"):
        module({"image": image})
