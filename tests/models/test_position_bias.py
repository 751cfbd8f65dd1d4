"""The gather of the position bias: forward, both forms of the gradient, and that the MLP runs once a layer and step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim_scale.config.schema import SwinV2Config
from simmim_scale.models import build_backbone
from simmim_scale.models.position_bias import added_by_diagonals, added_by_index, gather_bias
from simmim_scale.models.windows import relative_index

SIDES = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(window=SIDES, more=st.tuples(st.integers(0, 2), st.integers(0, 2)), heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_both_gradients_are_those_of_a_plain_lookup(window, more, heads, seed):
    table_window = (window[0] + more[0], window[1] + more[1])
    index = torch.from_numpy(relative_index(window, table_window).reshape(-1))
    offsets = (2 * table_window[0] - 1) * (2 * table_window[1] - 1)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(offsets, heads, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = window[0] * window[1]
    weights = torch.randn(heads, tokens, tokens, generator=generator, dtype=torch.float64)
    expected = table[index].t().reshape(heads, tokens, tokens)
    (wanted,) = torch.autograd.grad(expected, table, weights)
    bias = gather_bias(table, index, window=window, table_window=table_window)
    assert torch.equal(bias, expected)
    (got,) = torch.autograd.grad(bias, table, weights)
    for gradient in (got, added_by_index(weights, index, table_window), added_by_diagonals(weights, window, table_window)):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    index = torch.from_numpy(relative_index((2, 3), (3, 3)).reshape(-1))
    table = torch.randn(25, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: gather_bias(each, index, window=(2, 3), table_window=(3, 3)), (table,))


def test_the_mlp_runs_once_a_layer_and_step_whatever_the_batch():
    backbone = build_backbone(SwinV2Config(embed_dim=16, depths=(2, 1), num_heads=(1, 2), window_size=4, image_size=32))
    calls = []
    for name, module in backbone.named_modules():
        if name.endswith("cpb_mlp"):
            module.register_forward_hook(lambda _module, inputs, _output, name=name: calls.append((name, len(inputs[0]))))
    backbone(torch.zeros(5, 3, 32, 32)).sum().backward()
    assert len(calls) == 3
    assert {size for _, size in calls} == {49}  # one row for each offset, and not one for each pair


@pytest.mark.gpu
def test_the_gradient_of_the_table_has_the_same_bits_every_time_on_the_device():
    index = torch.from_numpy(relative_index((12, 12), (12, 12)).reshape(-1)).cuda()
    table = torch.randn(23 * 23, 44, generator=torch.Generator().manual_seed(0)).cuda().requires_grad_()
    weights = torch.randn(44, 144, 144, generator=torch.Generator().manual_seed(1)).cuda()
    bias = gather_bias(table, index, window=(12, 12), table_window=(12, 12))
    first, *others = (torch.autograd.grad(bias, table, weights, retain_graph=True)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, added_by_index(weights, index, (12, 12)), rtol=1e-4, atol=1e-3)
