"""What tasks rely on: shapes of features, any size and channels, small inputs, half precision, purity of blocks, clear errors."""

import copy
import pickle

import pytest
import torch

from simmim_scale.config.schema import CustomModelConfig, SwinConfig, SwinV2Config
from simmim_scale.models import build_backbone
from simmim_scale.models.features import FeaturePyramid

SIZES = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 4), "window_size": 4}


@pytest.fixture(params=["swin", "swin_v2"])
def section(request):
    return {"swin": SwinConfig, "swin_v2": SwinV2Config}[request.param]


def lively(backbone):
    """Give residual norms a weight, so that V2's branches take part."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
    return backbone


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (61, 90)])
def test_features_have_the_strides_and_channels_of_the_stages(section, size):
    backbone = build_backbone(section(image_size=64, **SIZES)).eval()
    assert (backbone.stride, backbone.num_features, backbone.embed_dim, backbone.patch_size) == (32, 96, 12, 4)
    assert (backbone.num_drop_paths, len(backbone.checkpointable_blocks())) == (16, 8)
    image = torch.rand(2, 3, *size)
    maps = backbone.features(image)
    for number, found in enumerate(maps):
        stride = 4 * 2**number
        assert found.shape == (2, 12 * 2**number, -(-size[0] // stride), -(-size[1] // stride))
    torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1), backbone(image))
    torch.testing.assert_close(backbone.encode(backbone.embed(image)), backbone(image))


def test_feature_pyramid_normalises_each_map(section, generator):
    backbone = build_backbone(section(image_size=64, **SIZES))
    pyramid = FeaturePyramid(backbone, stages=(1, 3)).eval()
    pyramid.init_norms(generator)
    first, last = pyramid(torch.rand(1, 3, 64, 64, generator=generator))
    assert (pyramid.channels, pyramid.strides) == ((24, 96), (8, 32))
    assert (first.shape, last.shape) == ((1, 24, 8, 8), (1, 96, 2, 2))
    torch.testing.assert_close(last.mean(1), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="stages 0 to 3"):
        FeaturePyramid(backbone, stages=(0, 4))


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (8, 4), (32, 32), (5, 67)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_inputs_give_finite_outputs_and_gradients(section, size, dtype):
    backbone = lively(build_backbone(section(image_size=32, **SIZES))).to(dtype)
    output = backbone(torch.rand(2, 3, *size))  # fp32 image into a half-precision model
    assert output.dtype == dtype
    assert output.isfinite().all()
    output.float().square().mean().backward()
    assert [name for name, parameter in backbone.named_parameters() if not parameter.grad.isfinite().all()] == []


def test_an_image_of_zeros_gives_finite_gradients(section):
    backbone = lively(build_backbone(section(image_size=32, **SIZES)))
    with torch.no_grad():
        backbone.patch_embed.proj.bias.zero_()  # then every token is a zero vector, also after its norm
    backbone(torch.zeros(1, 3, 64, 64)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


@pytest.mark.parametrize("in_chans", [1, 4])
def test_any_number_of_channels(section, in_chans):
    backbone = build_backbone(section(image_size=32, in_chans=in_chans, **SIZES))
    assert backbone(torch.rand(1, in_chans, 32, 32)).shape == (1, 1, 1, 96)
    with pytest.raises(ValueError, match=rf"expected \(batch, {in_chans}, height, width\), got \(1, 3, 32, 32\)"):
        backbone(torch.rand(1, 3, 32, 32))


def test_another_size_than_the_configured_one_keeps_the_window_rule():
    """A V2 called at another size equals one built for that size; a V1 keeps the windows its bias tables belong to."""
    ours = lively(build_backbone(SwinV2Config(image_size=32, **SIZES)))
    built = build_backbone(SwinV2Config(image_size=(96, 64), **SIZES))
    built.load_state_dict(ours.state_dict())
    image = torch.rand(1, 3, 96, 64)
    torch.testing.assert_close(ours(image), built(image))
    small = build_backbone(SwinConfig(image_size=32, **SIZES))
    assert small.layers[1].blocks[0].attn.window == (4, 4)
    assert small.layers[3].blocks[0].attn.window == (1, 1)
    assert small(image).shape == (1, 3, 2, 96)


def test_a_smaller_window_uses_the_middle_of_v1s_table():
    backbone = build_backbone(SwinConfig(image_size=64, **SIZES))
    attn = backbone.layers[0].blocks[0].attn
    with torch.no_grad():
        attn.relative_position_bias_table.copy_(torch.arange(49.0)[:, None])
    full = attn.position_bias((4, 4), torch.device("cpu"))[0].reshape(4, 4, 4, 4)
    part = attn.position_bias((2, 3), torch.device("cpu"))[0].reshape(2, 3, 2, 3)
    assert torch.equal(part, full[:2, :3, :2, :3])


def test_inference_first_and_training_after(section):
    backbone = lively(build_backbone(section(image_size=32, **SIZES)))
    with torch.inference_mode():
        backbone(torch.rand(1, 3, 64, 64))
    backbone(torch.rand(1, 3, 64, 64)).sum().backward()  # tables made in inference mode could not be saved for this


def test_checkpointed_blocks_give_the_same_gradients(section, generator):
    backbone = lively(build_backbone(section(image_size=64, drop_path=0.4, **SIZES)))
    twin = copy.deepcopy(backbone)
    for block in twin.checkpointable_blocks():
        plain = block.forward
        block.forward = lambda *tensors, plain=plain: torch.utils.checkpoint.checkpoint(
            plain, *tensors, use_reentrant=False, preserve_rng_state=False
        )
    image = torch.rand(3, 3, 64, 64, generator=generator)
    scales = torch.rand(16, 3, generator=generator)
    for model in (backbone, twin):
        model.encode(model.embed(image), scales).square().sum().backward()
    for (name, expected), parameter in zip(backbone.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad), name


def test_copies_and_pickles_work(section):
    backbone = build_backbone(section(image_size=32, **SIZES))
    image = torch.rand(1, 3, 32, 32)
    expected = backbone(image)
    torch.testing.assert_close(pickle.loads(pickle.dumps(backbone))(image), expected)


def test_autocast_runs_forward_and_backward(section):
    backbone = lively(build_backbone(section(image_size=64, **SIZES)))
    image = torch.rand(1, 3, 64, 64)
    exact = backbone(image)
    with torch.autocast("cpu", torch.bfloat16):
        rough = backbone(image)
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()
    rough.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())


class Plain(torch.nn.Module):
    """A backbone of one's own, as small as it can be."""

    def __init__(self, **options):
        super().__init__()
        self.options = options


def test_a_backbone_of_ones_own_is_found_by_address(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "my_backbones", __import__("types").SimpleNamespace(make=Plain))
    backbone = build_backbone(CustomModelConfig(name="my_backbones:make", image_size=(64, 32), options={"width": 3}))
    assert backbone.options == {"image_size": (64, 32), "patch_size": 4, "in_chans": 3, "width": 3}
    with pytest.raises(ValueError, match="has no attribute 'missing'"):
        build_backbone(CustomModelConfig(name="my_backbones:missing"))
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        build_backbone(CustomModelConfig(name="no_such_module:make"))


def test_an_unknown_name_lists_the_known():
    config = SwinV2Config(image_size=32, **SIZES).model_copy(update={"name": "swin_v3"})
    with pytest.raises(ValueError, match="Known: swin, swin_v2"):
        build_backbone(config)


def test_a_named_attention_that_is_unknown_fails_with_the_known_ones():
    backbone = build_backbone(SwinV2Config(image_size=32, **SIZES), attention="fastest")
    with pytest.raises(ValueError, match="unknown implementation 'fastest'"):
        backbone(torch.rand(1, 3, 32, 32))
