"""Windows in turn against all at once: the same bits, sums over windows aside, and none of the n x n matrices."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simmim_scale.kernels.window_attention import WITHOUT_MATRICES, window_attention
from tests.kernels.test_window_attention import NAMES, SHAPES, gradients, here, random_arguments

LARGE = (48, 36, (12, 12), (6, 6), 4, 16)


def attend(inputs, shape, name, rows):
    _, _, window, shift, heads, _ = shape
    qkv, bias, scale = inputs
    geometry = {"num_heads": heads, "window": window, "shift": shift}
    return window_attention(qkv, bias, logit_scale=scale, implementation=name, rows_at_once=rows, **geometry)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_fp32_is_bit_equal_but_for_sums_over_windows(name, cosine, shape, rows):
    qkv, bias, scale = random_arguments(shape, cosine, torch.float32)
    inputs = (
        qkv.detach().requires_grad_(),
        bias.detach().float().requires_grad_(),
        None if scale is None else scale.detach().float().requires_grad_(),
    )
    (whole, turns) = (attend(inputs, shape, name, n) for n in (0, rows))
    assert torch.equal(turns, whole)
    (of_qkv, *sums), (expected, *wanted) = gradients(turns, inputs), gradients(whole, inputs)
    if shape[:2] == shape[2]:  # a single window an image: PyTorch multiplies one matrix another way than two
        assert (of_qkv - expected).norm() <= 1e-7 * expected.norm()
    else:
        assert torch.equal(of_qkv, expected)
    # Most of the scale's gradient, a sum over all tokens, cancels.
    for found, known, tolerance in zip(sums, wanted, (3e-7, 5e-6)[: len(sums)], strict=True):
        assert (found - known).norm() <= tolerance * known.norm()
    again = gradients(attend(inputs, shape, name, rows), inputs)
    assert all(torch.equal(*pair) for pair in zip(again, (of_qkv, *sums), strict=True)), "turns are summed in a fixed order"


@pytest.mark.parametrize("name", [name for name in NAMES if here(name)])
def test_gradcheck(name):
    shape = (4, 4, (2, 2), (1, 1), 2, 3)
    qkv, bias, _ = random_arguments(shape, True)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: attend(tensors, shape, name, 1), (qkv, bias, scale))


def test_what_needs_no_gradient_gets_none():
    qkv, bias, scale = random_arguments(LARGE, True)
    for wanted in (qkv, bias, scale):
        others = [tensor if tensor is wanted else tensor.detach() for tensor in (qkv, bias, scale)]
        (found,) = torch.autograd.grad(attend(others, LARGE, "reference", 1).square().sum(), [wanted])
        (expected,) = torch.autograd.grad(attend(others, LARGE, "reference", 0).square().sum(), [wanted])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_went_in_is_kept(name):
    inputs = random_arguments(LARGE, True, torch.float32)
    inputs = (inputs[0], inputs[1].detach().float().requires_grad_(), inputs[2].detach().float().requires_grad_())
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
        attend(inputs, LARGE, name, 1)
    assert sorted(sizes) == sorted(tensor.numel() for tensor in inputs)


class Largest(TorchDispatchMode):
    """Elements of the largest result of any operator."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("rows", [1, 2])
def test_no_more_matrices_exist_than_those_of_a_turn(rows):
    height, width, window, _, heads, _ = LARGE
    inputs = random_arguments(LARGE, True, torch.float32)
    with Largest() as largest:
        attend(inputs, LARGE, "reference", rows).sum().backward()
    turn = rows * width // window[1] * heads * (window[0] * window[1]) ** 2
    assert largest.elements == max(turn, inputs[0].numel())
    with Largest() as largest:
        attend(inputs, LARGE, "reference", 0).sum().backward()
    assert largest.elements == 2 * height // window[0] * turn // rows


def test_an_implementation_without_matrices_is_left_whole(monkeypatch):
    from simmim_scale.kernels import window_attention as contract

    assert "triton" in WITHOUT_MATRICES
    monkeypatch.setattr(contract, "WITHOUT_MATRICES", ("reference",))
    monkeypatch.setattr(contract, "attend_in_turn", None)
    attend(random_arguments(SHAPES[1], True), SHAPES[1], "reference", 1)
