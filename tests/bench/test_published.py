"""The comparison model computes what ours computes: the same loss and gradients from the same weights."""

import pytest
import torch

from simmim_scale.bench.published import PublishedSimMIM
from simmim_scale.config.schema import Config, MaskConfig, ObjectiveConfig, SwinConfig, SwinV2Config
from simmim_scale.objectives.simmim import build_simmim

SMALL = {"image_size": (64, 64), "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
MODELS = {
    "swin_v2": SwinV2Config(**SMALL),
    "swin": SwinConfig(**SMALL),
    "extra norm, larger window": SwinV2Config(**{**SMALL, "window_size": 8}, extra_norm_period=2),
    "pre-trained windows": SwinV2Config(**SMALL, pretrained_window_sizes=(6, 3)),
    "no bias": SwinV2Config(**SMALL, qkv_bias=False),
}


def whole(model, window=None):
    return Config(model=model, mask=MaskConfig(cell=8), objective=ObjectiveConfig(norm_target_window=window))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("window", [None, 47])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_ours(name, window, checkpointed, generator):
    config = whole(MODELS[name], window)
    ours = build_simmim(config.model, config.objective, mean=(0.4,) * 3, std=(0.2,) * 3, seed=0, attention="reference")
    with torch.no_grad():
        for parameter in ours.parameters():  # nothing is 0 or 1: the post-norms begin at 0 and would hide the blocks
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs = PublishedSimMIM(config, dict(ours.named_parameters()), checkpointed=checkpointed)
    image = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    mask = torch.rand(2, 8, 8, generator=generator) < 0.6
    patches = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).float()
    loss = ours({"image": image, "mask": mask})["loss"]
    other = theirs(image, patches)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    loss.backward()
    other.backward()
    largest = max(parameter.grad.norm() for parameter in ours.parameters())
    for key, parameter in ours.named_parameters():
        got = theirs.values[key.replace(".", "/")].grad
        assert (got - parameter.grad).norm() <= 1e-4 * max(parameter.grad.norm(), 1e-2 * largest), key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (whole(SwinV2Config(**{**SMALL, "window_size": 5})), "Choose a window that divides each"),
        (whole(SwinV2Config(**{**SMALL, "image_size": (64, 32)})), "takes squares, got 64x32"),
    ],
)
def test_what_the_published_code_cannot_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        PublishedSimMIM(config, {})
