"""Drop path as an argument: pure in (seed, position, branch), with the right rates, applied to every branch."""

import pytest
import torch

from simmim_scale.config.schema import SwinConfig, SwinV2Config
from simmim_scale.models import build_backbone
from simmim_scale.models.drop_path import drop_path_rates, sample_drop_path

LOW = (1 << 64) - 1


def splitmix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & LOW
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & LOW
    return value ^ (value >> 31)


def scale_in_plain_integers(rate, branch, seed, position):
    golden = 0x9E3779B97F4A7C15
    key = splitmix((position ^ splitmix((seed + golden) & LOW)) & LOW)
    uniform = (splitmix((key + (branch + 1) * golden) & LOW) >> 40) / 2**24
    return 0.0 if uniform < rate else 1.0 / (1.0 - rate)


def test_equals_unsigned_integer_arithmetic():
    rates, positions = (0.0, 0.3, 0.9), [0, 1, 2, 12345678901, 2**62 + 7]
    scales = sample_drop_path(rates, 2**32 - 1, torch.tensor(positions))
    expected = [
        [scale_in_plain_integers(rate, branch, 2**32 - 1, place) for place in positions] for branch, rate in enumerate(rates)
    ]
    torch.testing.assert_close(scales, torch.tensor(expected), rtol=1e-6, atol=0)


def test_does_not_depend_on_the_batch_or_the_global_generator():
    positions = torch.arange(1000, 1064)
    torch.manual_seed(1)
    whole = sample_drop_path((0.2,) * 8, 5, positions)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    shuffled = positions.flip(0)
    parts = torch.cat([sample_drop_path((0.2,) * 8, 5, part) for part in shuffled.split(7)], dim=1).flip(1)
    assert torch.equal(whole, parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(whole, sample_drop_path((0.2,) * 8, 6, positions))


def test_rates_are_met_and_branches_are_independent():
    rates = (0.0, 0.1, 0.5, 0.5)
    scales = sample_drop_path(rates, 0, torch.arange(40000))
    dropped = (scales == 0).double()
    for share, rate in zip(dropped.mean(1), rates, strict=True):
        assert abs(share - rate) < 0.01
    both = (dropped[2] * dropped[3]).mean()
    assert abs(both - 0.25) < 0.01
    neighbours = (dropped[2, :-1] * dropped[2, 1:]).mean()
    assert abs(neighbours - 0.25) < 0.01


def test_rates_grow_linearly_with_two_branches_a_block():
    assert drop_path_rates(0.3, 4) == pytest.approx((0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3))
    assert drop_path_rates(0.3, 1) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        sample_drop_path((1.0,), 0, torch.arange(2))


@pytest.mark.parametrize("section", [SwinConfig, SwinV2Config])
def test_backbone_uses_given_scales_and_draws_them_only_in_training(section, generator):
    config = section(image_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2), drop_path=0.5)
    backbone = build_backbone(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    tokens = backbone.embed(torch.randn(3, 3, 32, 32, generator=generator))
    backbone.eval()
    plain = backbone.encode(tokens)
    torch.testing.assert_close(backbone.encode(tokens, torch.ones(8, 3)), plain)
    scales = torch.ones(8, 3)
    for branch in range(8):
        changed = scales.clone()
        changed[branch, 1] = 0
        output = backbone.encode(tokens, changed)
        torch.testing.assert_close(output[[0, 2]], plain[[0, 2]])
        assert not torch.allclose(output[1], plain[1]), f"branch {branch} was not dropped"
    backbone.train()
    torch.manual_seed(0)
    drawn = backbone.encode(tokens)
    assert not torch.allclose(drawn, plain)
    torch.manual_seed(0)
    assert torch.equal(backbone.encode(tokens), drawn)


def test_wrong_number_of_scales_is_named():
    backbone = build_backbone(SwinV2Config(image_size=32, window_size=4, embed_dim=8, depths=(2,), num_heads=(2,)))
    with pytest.raises(ValueError, match=r"expected \(4, 2\), got \(3, 2\)"):
        backbone.encode(torch.zeros(2, 8, 8, 8), torch.ones(3, 2))
