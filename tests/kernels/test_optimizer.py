"""Every form of AdamW that can run here, against the formula in float64; what cannot run says why."""

import math
import os

import pytest
import torch

from simmim_scale.kernels.dispatch import choose, implementations
from simmim_scale.kernels.optimizer import choose_optimizer

BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 1e-3, 0.05
SHAPES = [(7,), (33, 65), (4, 3, 5)]


def able(device: torch.device) -> list[str]:
    names = []
    for name in implementations("optimizer"):
        try:
            choose("optimizer", name, device=device, dtype=torch.float32)
        except ValueError:
            continue
        names.append(name)
    return names


# DeepSpeed's Adam for CPUs compiles for two minutes: SIMMIM_TEST_DEEPSPEED_CPU=1 tests it too.
COMPILED = {"deepspeed_cpu"} if os.environ.get("SIMMIM_TEST_DEEPSPEED_CPU") != "1" else set()
HERE = [name for name in able(torch.device("cpu")) if name not in COMPILED]
ON_GPU = able(torch.device("cuda")) if torch.cuda.is_available() else ["torch_fused", "torch_foreach", "apex", "deepspeed"]


def expected(start, gradients, *, decay):
    """The update written out in float64: decoupled decay, both moments corrected for their start at 0."""
    value = start.double()
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    for count, gradient in enumerate(gradients, start=1):
        gradient = gradient.double()
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        update = (first / (1 - BETAS[0] ** count)) / ((second / (1 - BETAS[1] ** count)).sqrt() + EPS)
        value = value - LR * decay * value - LR * update
    return value


def check_against_float64(name: str, device: torch.device, *, steps: int = 50) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    # Magnitudes from 1e-6 to 10, so that eps and the corrections matter.
    gradients = [
        [torch.randn(shape, generator=generator) * 10.0 ** (1 - 7 * step / steps) for step in range(steps)] for shape in SHAPES
    ]
    parameters = [torch.nn.Parameter(start.to(device, copy=True)) for start in starts]
    form = choose_optimizer(name, device=device)
    groups = [{"params": parameters[:1], "weight_decay": 0.0}, {"params": parameters[1:], "weight_decay": DECAY}]
    optimizer = form.cls(groups, lr=0.0, betas=BETAS, eps=EPS, **form.arguments)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR  # as the engine sets it
        for parameter, own in zip(parameters, gradients, strict=True):
            parameter.grad = own[step].to(device)
        optimizer.step()
    for index, parameter in enumerate(parameters):
        wanted = expected(starts[index], gradients[index], decay=0.0 if index == 0 else DECAY)
        moved = (wanted - starts[index]).abs().max()
        error = (parameter.detach().cpu().double() - wanted).abs().max()
        # A rounding of the parameter in each step, and fp32 moments; without decay or correction it would be 100 times that.
        assert error <= steps * 2.0**-24 * starts[index].abs().max() + 2e-5 * moved, (name, index)


@pytest.mark.parametrize("name", HERE)
def test_every_form_is_the_published_update(name):
    check_against_float64(name, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_every_form_is_the_published_update_on_a_gpu(name):
    check_against_float64(name, torch.device("cuda"))


def test_decay_and_correction_matter_in_this_test():
    start, gradients = torch.ones(3), [torch.full((3,), 0.5)] * 3
    plain = expected(start, gradients, decay=0.0)
    assert (expected(start, gradients, decay=DECAY) - plain).abs().min() > 1e-5
    assert plain[0] == pytest.approx(1 - 3 * LR, abs=1e-9), "corrected, equal gradients move by the rate"
    assert not math.isclose(float(plain[0]), 1.0)


@pytest.mark.parametrize("name", [name for name in HERE if choose_optimizer(name, device=torch.device("cpu")).skips_on_device])
def test_what_skips_on_the_device_honours_both_attributes(name):
    form = choose_optimizer(name, device=torch.device("cpu"))
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [form.cls([p], lr=LR, betas=BETAS, eps=EPS, **form.arguments) for p in parameters]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 8.0), torch.full((3,), 2.0)
    optimizers[0].grad_scale, optimizers[0].found_inf = torch.tensor(4.0), torch.tensor(0.0)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(optimizers[0].state[parameters[0]]["exp_avg"], optimizers[1].state[parameters[1]]["exp_avg"])
    kept = parameters[0].detach().clone()
    optimizers[0].found_inf = torch.tensor(1.0)
    optimizers[0].step()
    assert torch.equal(parameters[0], kept)
    assert optimizers[0].state[parameters[0]]["step"] == 1


def test_auto_is_the_one_that_skips_on_the_device_and_never_compiles():
    for device in ("cpu", "cuda"):
        assert choose("optimizer", "auto", device=torch.device(device), dtype=torch.float32).name == "torch_fused"


def test_what_cannot_run_says_why():
    for name, reason in {"deepspeed": "for CUDA, not for cpu", "apex": "for CUDA, not for cpu"}.items():
        with pytest.raises(ValueError, match=reason):
            choose_optimizer(name, device=torch.device("cpu"))


def test_another_package_called_apex_is_recognised(tmp_path, monkeypatch):
    from simmim_scale.kernels.optimizer import apex

    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert "is not NVIDIA's Apex" in apex.unavailable(torch.device("cuda"), torch.float32)
