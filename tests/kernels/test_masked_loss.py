"""Every form of the masked loss against the published formula over whole pictures in float64, and its gradient."""

import pytest
import torch

from simmim_scale.kernels.masked_loss import Layout, masked_loss
from tests.kernels.masked_loss_cases import CASES, Case, errors, make_inputs, run


@pytest.mark.parametrize("implementation", ["reference", "one_pass"])
@pytest.mark.parametrize("name", CASES)
def test_sums_and_gradients_equal_the_published_formula(name, implementation):
    assert max(errors(CASES[name], implementation, torch.float32)) < 2e-6


@pytest.mark.parametrize("implementation", ["reference", "one_pass"])
def test_half_precision_is_summed_in_fp32(implementation):
    sums, gradient = errors(CASES["smooth l1"], implementation, torch.bfloat16)
    assert sums < 2e-3
    assert gradient < 4e-3
    inputs = make_inputs(CASES["published"])
    assert run(CASES["published"], inputs, implementation, torch.bfloat16)[0].dtype == torch.float32


@pytest.mark.parametrize("loss", ["l2", "smooth_l1"])
def test_gradcheck(loss):
    case = Case(size=(4, 6), patch=2, cell=2, loss=loss, stored=False, chosen=4)
    inputs = make_inputs(case)
    options = {"layout": inputs.layout, "tokens": inputs.tokens, "flip": inputs.flip, "loss": loss, "beta": 0.7}
    call = lambda prediction: masked_loss(prediction, inputs.image.double(), inputs.mask, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs.prediction.clone().requires_grad_())


def test_a_long_batch_is_cut_into_pieces_without_a_seam(monkeypatch):
    from simmim_scale.kernels.masked_loss import one_pass

    inputs = make_inputs(CASES["published"])
    whole = run(CASES["published"], inputs, "one_pass", torch.float32)
    monkeypatch.setattr(one_pass, "CHUNK_NUMBERS", 400)
    for expected, actual in zip(whole, run(CASES["published"], inputs, "one_pass", torch.float32), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("implementation", ["reference", "one_pass"])
def test_nothing_hidden_is_a_sum_of_zero(implementation):
    inputs = make_inputs(CASES["published"])
    prediction = inputs.prediction.float().requires_grad_()
    nothing = torch.zeros_like(inputs.mask)
    sums = masked_loss(prediction, inputs.image.float(), nothing, layout=inputs.layout, implementation=implementation)
    sums.sum().backward()
    assert not sums.any()
    assert not prediction.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "l3"}, "unknown name 'l3'"),
        ({"beta": 0.0}, "expected a positive number"),
        ({"layout": Layout((2, 3), 4, 8)}, "the prediction has 192"),
        ({"layout": Layout((3, 3), 8, 8)}, "6 patches for a grid of 3x3"),
        ({"layout": Layout((1, 6), 8, 8)}, "do not cover 16x24"),
        ({"layout": Layout((2, 3), 8, 4)}, "units of 4 do not cover"),
        ({"implementation": "triton"}, "cannot run here"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(change, message):
    inputs = make_inputs(CASES["published"])
    arguments = {"layout": inputs.layout, **change}
    with pytest.raises(ValueError, match=message):
        masked_loss(inputs.prediction.float(), inputs.image.float(), inputs.mask, **arguments)
