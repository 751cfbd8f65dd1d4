"""Another window or image size: unchanged is the identity, a doubled window agrees with computations written out here."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import make_interp_spline

from simmim_scale.config.schema import CustomModelConfig, SwinConfig, SwinV2Config
from simmim_scale.models import build_backbone
from simmim_scale.models.resizing import (
    complete_model,
    geometric_offsets,
    parse_model,
    reference_windows,
    resize_bias_table,
    resize_state,
    stage_windows,
)

SIZES = {"embed_dim": 12, "depths": (2, 2), "num_heads": (3, 4)}
PUBLISHED = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


def random_table(window, heads, generator):
    return torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads, generator=generator)


# ------------------------------------------------------------------------------------------------------------ V1: tables


def cubic_convolution(values, new):
    """Keys' kernel with a = -0.75 at half-pixel centres, the border repeated: bicubic resizing along the first axis."""

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    old = len(values)
    rows = []
    for index in range(new):
        place = (index + 0.5) * old / new - 0.5
        near = math.floor(place)
        rows.append(sum(kernel(place - k) * values[min(max(k, 0), old - 1)] for k in range(near - 1, near + 3)))
    return np.stack(rows)


def beit_axis(old, new):
    """Places of the old entries by bisection of the common ratio, as BEiT writes it."""
    low, high = 1.01, 1.5
    while high - low > 1e-9:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (old // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > new // 2 else (ratio, high)
    outward, place = [], 1.0
    for power in range(old // 2):
        outward.append(place)
        place += ratio ** (power + 1)
    return np.array([-x for x in reversed(outward)] + [0.0] + outward)


def spline(values, places, wanted):
    return make_interp_spline(places, values, k=3, axis=0)(wanted)


@pytest.mark.parametrize(("before", "after"), [((6, 6), (12, 12)), ((6, 5), (12, 8)), ((7, 7), (14, 7))])
def test_tables_agree_with_independent_computations(before, after, generator):
    table = random_table(before, 3, generator)
    image = table.double().numpy().reshape(2 * before[0] - 1, 2 * before[1] - 1, 3)
    new = [2 * side - 1 for side in after]
    stretched = cubic_convolution(cubic_convolution(image, new[0]).swapaxes(0, 1), new[1]).swapaxes(0, 1)
    np.testing.assert_allclose(
        resize_bias_table(table, before, after, method="bicubic").numpy(), stretched.reshape(-1, 3), atol=1e-5
    )
    for axis, (old, size) in enumerate(zip(image.shape[:2], new, strict=True)):
        places = np.arange(-(old // 2), old // 2 + 1) if old == size else beit_axis(old, size)
        wanted = np.clip(np.arange(-(size // 2), size // 2 + 1), places[0], places[-1])
        image = spline(image.swapaxes(0, axis), places, wanted).swapaxes(0, axis)
    np.testing.assert_allclose(
        resize_bias_table(table, before, after, method="geometric").numpy(), image.reshape(-1, 3), atol=1e-5
    )


@pytest.mark.parametrize("method", ["geometric", "bicubic"])
@pytest.mark.parametrize(("before", "after"), [((12, 12), (7, 7)), ((1, 1), (4, 4)), ((2, 6), (5, 1)), ((3, 3), (2, 2))])
def test_smaller_and_tiny_windows_stay_in_range(before, after, method, generator):
    table = random_table(before, 2, generator)
    resized = resize_bias_table(table, before, after, method=method)
    assert resized.shape == ((2 * after[0] - 1) * (2 * after[1] - 1), 2)
    assert resized.abs().max() <= 2 * table.abs().max()
    centre = resized[resized.shape[0] // 2]
    torch.testing.assert_close(centre, table[table.shape[0] // 2], atol=1e-5, rtol=0)  # no offset keeps its bias


def test_a_constant_table_stays_constant():
    table = torch.full(((2 * 6 - 1) ** 2, 4), 0.7)
    for method in ("geometric", "bicubic"):
        torch.testing.assert_close(resize_bias_table(table, (6, 6), (14, 14), method=method), torch.full((27 * 27, 4), 0.7))


def test_the_geometric_places_reach_the_edge_with_growing_gaps():
    places = geometric_offsets(11, 27)
    assert places[-1] == pytest.approx(13)
    gaps = np.diff(places[5:])
    np.testing.assert_allclose(gaps[1:] / gaps[:-1], gaps[1] / gaps[0])
    assert gaps[0] == pytest.approx(1.0)
    np.testing.assert_array_equal(geometric_offsets(11, 11), np.arange(-5, 6))


@pytest.mark.parametrize(
    ("source", "target", "windows"),
    [
        (SwinConfig(image_size=192, window_size=6, **PUBLISHED), {"image_size": 224, "window_size": 7}, (6, 7)),
        (SwinConfig(image_size=192, window_size=12, **PUBLISHED), {"image_size": 224, "window_size": 14}, (12, 14)),
        (SwinConfig(image_size=(32, 64), window_size=8, **SIZES), {"image_size": (64, 96), "window_size": 12}, None),
    ],
)
@pytest.mark.parametrize("method", ["geometric", "bicubic"])
def test_a_v1_backbone_loads_its_resized_state(source, target, windows, method):
    backbone = build_backbone(source)
    wanted = SwinConfig(**{**source.model_dump(), **target})
    if windows:
        assert (stage_windows(source)[0], stage_windows(wanted)[0]) == ((windows[0],) * 2, (windows[1],) * 2)
    resized = resize_state(backbone.state_dict(), source, wanted, method=method)
    other = build_backbone(wanted, seed=1)
    other.load_state_dict(resized.state)  # strict: every name and shape
    assert any("image" in note for note in resized.notes)
    assert any(f"tables interpolated ({method})" in note for note in resized.notes)
    changed = {name for name, value in backbone.state_dict().items() if resized.state[name].shape != value.shape}
    assert changed
    assert all(name.endswith("relative_position_bias_table") for name in changed)
    assert torch.isfinite(other(torch.randn(1, 3, *wanted.image_size))).all()


@pytest.mark.parametrize(
    "model", [SwinConfig(image_size=32, window_size=4, **SIZES), SwinV2Config(image_size=32, window_size=8, **SIZES)]
)
def test_an_unchanged_size_is_the_identity(model):
    state = build_backbone(model).state_dict()
    assert complete_model(model, model) is model
    for method in ("geometric", "bicubic"):
        resized = resize_state(state, model, model, method=method)
        assert not resized.notes
        assert all(resized.state[name] is value for name, value in state.items())
    table = torch.randn(49, 3)
    assert resize_bias_table(table, (4, 4), (4, 4), method="geometric") is table


# --------------------------------------------------------------------------------------------- V2: pre-training windows


def test_v2_takes_the_windows_of_pretraining_per_stage():
    source = SwinV2Config(image_size=192, window_size=12, **PUBLISHED)
    target = SwinV2Config(image_size=224, window_size=14, **PUBLISHED)
    completed = complete_model(source, target)
    assert completed.pretrained_window_sizes == (12, 12, 12, 6)  # as the released fine-tuning configurations have it
    told = target.model_copy(update={"pretrained_window_sizes": (12, 12, 12, 6)})
    assert complete_model(source, told) is told
    further = complete_model(completed, SwinV2Config(image_size=512, window_size=32, **PUBLISHED))
    assert further.pretrained_window_sizes == (12, 12, 12, 6)  # the MLP was never trained relative to 14
    larger = complete_model(source, SwinV2Config(image_size=384, window_size=12, **PUBLISHED))
    assert larger.pretrained_window_sizes == (12, 12, 12, 6)  # the last stage grew from 6 to 12
    resized = resize_state({"a": torch.ones(1)}, source, completed)
    assert resized.notes[1:] == ["windows 12,12,12,6 -> 14,14,14,7", "position bias by log-spaced offsets of windows 12,12,12,6"]


def test_v2_keeps_the_bias_of_every_offset_it_knew_and_a_doubled_window_agrees_with_the_formula():
    source = SwinV2Config(image_size=(32, 64), window_size=6, **SIZES)
    target = complete_model(source, source.model_copy(update={"image_size": (64, 128), "window_size": 12}))
    assert reference_windows(source) == reference_windows(target) == [(6, 6), (4, 6)]
    assert parse_model(target.model_dump(mode="json")) == target  # a rectangular window survives storing
    backbone, other = build_backbone(source), build_backbone(target, seed=1)
    other.load_state_dict(resize_state(backbone.state_dict(), source, target).state)
    for stage, (small, large) in enumerate(zip(stage_windows(source), stage_windows(target), strict=True)):
        before, after = (net.layers[stage].blocks[0].attn for net in (backbone, other))
        own = before.position_bias(small, torch.device("cpu")).reshape(-1, *small, *small)
        new = after.position_bias(large, torch.device("cpu")).reshape(-1, *large, *large)
        assert torch.equal(new[:, : small[0], : small[1], : small[0], : small[1]], own)
        first, last = after.cpb_mlp[0], after.cpb_mlp[2]
        for (i, j), (k, m) in (((0, 0), (large[0] - 1, large[1] - 1)), ((large[0] - 1, 2), (0, 5))):
            offset = torch.tensor([i - k, j - m], dtype=torch.float64) * 8 / (torch.tensor(small, dtype=torch.float64) - 1)
            point = offset.sign() * torch.log2(1 + offset.abs()) / 3
            hidden = torch.relu(first.weight.double() @ point + first.bias.double())
            expected = 16 * torch.sigmoid(last.weight.double() @ hidden)
            torch.testing.assert_close(new[:, i, j, k, m].double(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- errors


def test_other_architectures_are_refused_by_setting():
    source = SwinV2Config(image_size=32, window_size=4, **SIZES)
    for change, value in (("in_chans", 1), ("patch_size", 2), ("embed_dim", 24), ("depths", (2, 4)), ("extra_norm_period", 2)):
        other = source.model_copy(update={change: value})
        with pytest.raises(ValueError, match=f"of another model: {change} is"):
            complete_model(source, other)
        with pytest.raises(ValueError, match=f"of another model: {change} is"):
            resize_state({}, source, other)
    with pytest.raises(ValueError, match="name is swin_v2 in the weights and swin in model"):
        complete_model(source, SwinConfig(image_size=32, window_size=4, **SIZES))


def test_other_pretraining_windows_are_refused():
    source = SwinV2Config(image_size=32, window_size=4, **SIZES)
    target = SwinV2Config(image_size=64, window_size=8, pretrained_window_sizes=(6, 6), **SIZES)
    with pytest.raises(ValueError, match=r"\[6, 6\] was asked for, but the weights were trained with windows \[4, 4\]"):
        complete_model(source, target)


def test_a_table_that_contradicts_its_configuration_is_refused():
    source = SwinConfig(image_size=32, window_size=4, **SIZES)
    target = source.model_copy(update={"window_size": 8})
    with pytest.raises(ValueError, match="expected 49 rows for the window 4x4"):
        resize_state({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(225, 3)}, source, target)


def test_stored_sections_of_another_version_are_a_clear_error():
    with pytest.raises(ValueError, match="does not fit this version"):
        parse_model({"name": "swin", "windows": 4})


def test_networks_of_ones_own_pass_through():
    model = CustomModelConfig(name="mynet:build", image_size=64)
    other = model.model_copy(update={"image_size": (96, 96)})
    state = {"backbone.x": torch.ones(1)}
    assert complete_model(model, other) is other
    assert resize_state(state, model, other).state == state
