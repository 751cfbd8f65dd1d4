"""ViT: timm's numbers with our embed and encode, drop path as an argument, published sizes."""

import pytest
import torch
from timm.models.beit import Beit

from simmim_scale.config.load import ConfigError, validate
from simmim_scale.config.schema import ViTConfig
from simmim_scale.config.yaml_source import Source
from simmim_scale.models import build_backbone
from simmim_scale.models.complexity import count_parameters, multiply_adds
from simmim_scale.models.resizing import resize_bias_table, resize_state

SMALL = {"image_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize("position_bias", ["shared", "per_block"])
def test_equals_timm_on_its_weights(position_bias):
    ours = build_backbone(ViTConfig(**SMALL, position_bias=position_bias), seed=2).double().eval()
    shared = position_bias == "shared"
    theirs = Beit(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=3, num_heads=2, init_values=0.1, num_classes=0,
        use_abs_pos_emb=False, use_shared_rel_pos_bias=shared, use_rel_pos_bias=not shared,
        global_pool="token", use_fc_norm=False,
    ).double().eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "relative_position_bias_table" in name:  # published models start at 0, which would hide its order
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    state = ours.state_dict()
    state["cls_token"] = state.pop("cls_token.token").view(1, 1, -1)
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys
    image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    out, expected = ours(image), theirs.forward_features(image)[:, 1:].view(2, 4, 6, 24)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight, twin = ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), twin)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)


def test_dropped_branches_are_left_out():
    network = build_backbone(ViTConfig(**SMALL, drop_path=0.5), seed=2)
    tokens = network.embed(torch.randn(2, 3, 32, 48))
    assert network.num_drop_paths == 6
    nothing = torch.zeros(6, 2)
    kept = torch.ones(6, 2)
    kept[:, 1] = 0.0
    out = network.encode(tokens, kept)
    torch.testing.assert_close(out[0], network.eval().encode(tokens)[0])
    network.train()
    torch.testing.assert_close(out[1], network.encode(tokens, nothing)[1])
    torch.testing.assert_close(network.encode(tokens, nothing), network.norm(tokens))


def test_published_size():
    with torch.device("meta"):
        network = build_backbone(ViTConfig(), seed=None)
    # ViT-B/16: 85.8M with absolute positions (0.15M), which this one does not have; 17.5G multiply-adds (DeiT-B).
    assert count_parameters(network) / 1e6 == pytest.approx(85.7, abs=0.2)
    assert multiply_adds(network, (224, 224)) / 1e9 == pytest.approx(17.5, rel=0.02)


def test_wrong_sizes_are_clear():
    network = build_backbone(ViTConfig(**SMALL), seed=0)
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 32, 48\), got \(1, 3, 48, 32\)"):
        network(torch.zeros(1, 3, 48, 32))
    with pytest.raises(ConfigError, match="multiple of the patch size 16, got 200x200"):
        validate(Source(tree={"model": {"name": "vit", "image_size": 200}, "mask": {"cell": 40}}))
    with pytest.raises(ConfigError, match="divisor of the width 768, got 5"):
        validate(Source(tree={"model": {"name": "vit", "num_heads": 5}}))


def test_a_shared_bias_becomes_that_of_every_block_and_computes_the_same():
    shared, own = ViTConfig(**SMALL), ViTConfig(**SMALL, position_bias="per_block")
    before, after = build_backbone(shared, seed=2), build_backbone(own, seed=3)
    with torch.no_grad():
        before.rel_pos_bias.relative_position_bias_table.normal_()
    resized = resize_state({f"backbone.{name}": value for name, value in before.state_dict().items()}, shared, own)
    assert resized.notes == [f"the shared bias table is now that of each of {own.depth} blocks"]
    after.load_state_dict({name.removeprefix("backbone."): value for name, value in resized.state.items()})
    image = torch.randn(2, 3, *shared.image_size)
    torch.testing.assert_close(after.eval()(image), before.eval()(image), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"Set model\.position_bias=per_block"):
        resize_state(after.state_dict(), own, shared)


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
def test_another_image_size_interpolates_the_offsets_and_keeps_the_rows_of_the_class_token(method):
    small = ViTConfig(**SMALL)
    rows, columns = (side // small.patch_size for side in small.image_size)
    large = ViTConfig(**(SMALL | {"image_size": tuple(2 * side for side in small.image_size)}))
    network = build_backbone(small, seed=2)
    name = "rel_pos_bias.relative_position_bias_table"
    with torch.no_grad():
        network.rel_pos_bias.relative_position_bias_table.normal_()
    table = network.state_dict()[name]
    resized = resize_state(network.state_dict(), small, large, method=method)
    assert resized.notes[1] == f"1 bias tables interpolated ({method})"
    expected = resize_bias_table(table[:-3], (rows, columns), (2 * rows, 2 * columns), method=method)
    assert resized.state[name][:-3].equal(expected)
    assert resized.state[name][-3:].equal(table[-3:])
    build_backbone(large, seed=None).load_state_dict(resized.state)
