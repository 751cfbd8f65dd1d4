"""ResNet: torchvision's numbers behind our stem, published sizes, and running statistics that training cannot spoil."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from simmim_scale.config.schema import IMAGENET_MEAN, IMAGENET_STD, ObjectiveConfig, ResNetConfig
from simmim_scale.engine.activation_checkpointing import apply_activation_checkpointing
from simmim_scale.models import build_backbone
from simmim_scale.models.complexity import count_parameters, multiply_adds
from simmim_scale.models.resnet import BatchNorm
from simmim_scale.objectives.simmim import build_simmim

SMALL = ResNetConfig(image_size=64, depths=(1, 1), width=1)


def torchvision_twin(ours: nn.Module) -> nn.Module:
    """torchvision's ResNet-50 with the stem of the supplement, holding the weights of `ours`."""
    theirs = resnet50()
    theirs.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    theirs.maxpool = nn.MaxPool2d(2)
    theirs.fc = theirs.avgpool = nn.Identity()
    pairs = [(ours.stem.conv, theirs.conv1, theirs.bn1)]
    for stage, layer in zip(ours.layers, (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
        for block, twin in zip(stage, layer, strict=True):
            pairs += [
                (block.reduce, twin.conv1, twin.bn1),
                (block.spatial, twin.conv2, twin.bn2),
                (block.expand, twin.conv3, twin.bn3),
            ]
            if block.shortcut is not None:
                pairs.append((block.shortcut, *twin.downsample))
    for pair, conv, norm in pairs:
        conv.load_state_dict(pair.conv.state_dict())
        norm.load_state_dict({**pair.norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return theirs


@pytest.mark.parametrize("training", [False, True])
def test_equals_torchvision_behind_the_stem(training):
    ours = build_backbone(ResNetConfig(image_size=64, width=1), seed=3).double().train(training)
    theirs = torchvision_twin(ours).double().train(training)
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    out = ours(image)
    expected = theirs(image).view(2, 2048, 2, 3).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight, twin = ours.layers[0][0].reduce.conv.weight, theirs.layer1[0].conv1.weight
    (gradient,) = torch.autograd.grad(out.square().mean(), weight)
    (expected_gradient,) = torch.autograd.grad(expected.square().mean(), twin)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-12)
    if training:
        torch.testing.assert_close(
            ours.layers[3][2].expand.norm.running_var.double(), theirs.layer4[2].bn3.running_var, rtol=1e-6, atol=0
        )


def test_published_sizes():
    with torch.device("meta"):
        wide = build_backbone(ResNetConfig(image_size=224), seed=None)
        narrow = build_backbone(ResNetConfig(image_size=224, width=1), seed=None)
    # SimCLR (arXiv 2002.05709, table 1): ResNet-50 (4x) has 375M, ResNet-50 24M parameters, without the classifier.
    assert count_parameters(wide) / 1e6 == pytest.approx(375, abs=1)
    assert count_parameters(narrow) / 1e6 == pytest.approx(23.5, abs=0.5)
    # Every convolution but the first has four times the inputs and four times the outputs.
    stem = 3 * 64 * 9 * 112 * 112
    counted = [multiply_adds(network, (224, 224)) for network in (wide, narrow)]
    assert counted[0] - 4 * stem == 16 * (counted[1] - stem)


def test_hidden_pixels_do_not_reach_the_prediction():
    module = build_simmim(SMALL, ObjectiveConfig(), mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0).eval()
    image = torch.randn(1, 3, 64, 64)
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0] = True
    other = image.clone()
    other[:, :, :28, :28] += 5.0  # a 3x3 convolution of stride 2 sees one pixel across the border of the cell
    with torch.no_grad():
        first, second = (module({"image": pixels, "mask": mask})["prediction"] for pixels in (image, other))
        assert torch.equal(first, second)
        other[:, :, 40, 40] += 5.0
        assert not torch.equal(first, module({"image": other, "mask": mask})["prediction"])


def test_checkpointing_counts_a_batch_once():
    plain = build_backbone(SMALL, seed=1)
    checkpointed = copy.deepcopy(plain)
    holder = nn.Module()
    holder.backbone = checkpointed
    assert apply_activation_checkpointing(holder, "block") == 2
    image = torch.randn(3, 3, 64, 64)
    for network in (plain, checkpointed):
        network(image).square().mean().backward()
    for (name, buffer), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_a_batch_that_is_not_finite_leaves_the_statistics():
    norm = BatchNorm(2)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    norm(torch.randn(4, 2, 3, 3))
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    bad = torch.randn(4, 2, 3, 3)
    bad[0, 1, 0, 0] = float("nan")
    norm(bad)
    assert torch.equal(norm.running_mean[1], before["running_mean"][1])
    assert not torch.equal(norm.running_mean[0], before["running_mean"][0])
    assert norm.running_var.isfinite().all()


def test_bf16_normalises_in_fp32():
    norm = BatchNorm(8).bfloat16()
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    x = (torch.randn(16, 8, 4, 4) * 3 + 100).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    wide = x.float()
    expected = (wide - wide.mean((0, 2, 3), keepdim=True)) / wide.var((0, 2, 3), keepdim=True, unbiased=False).add(1e-5).sqrt()
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    assert norm.running_mean.dtype == torch.float32


def test_wrong_channels():
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\), got \(1, 1, 64, 64\)"):
        build_backbone(SMALL, seed=0)(torch.zeros(1, 1, 64, 64))
