"""Groups of parameters as published, and the optimizer that checks gradients where DeepSpeed does not."""

import pytest
import torch
from torch import nn

from simmim_scale.config.schema import OptimizerConfig
from simmim_scale.engine.optim import build_adamw, decays, parameter_groups
from simmim_scale.engine.schedule import set_learning_rate
from simmim_scale.kernels.optimizer import choose_optimizer

CPU = torch.device("cpu")
FORMS = ["torch_fused", "torch_foreach", "reference"]  # skipping on the device, and waiting for the norm


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("backbone.layers.0.blocks.0.attn.qkv.weight", (6, 2), True),
        ("head.weight", (48, 8, 1, 1), True),
        ("backbone.layers.0.blocks.0.attn.qkv.q_bias", (2,), False),
        ("backbone.norm.weight", (2,), False),
        ("head.bias", (2, 1), False),
        ("mask_token.token", (1, 1, 8), False),
        ("backbone.layers.0.blocks.0.attn.cpb_mlp.0.weight", (512, 2), False),
        ("backbone.layers.0.blocks.0.attn.logit_scale", (3, 1, 1), False),
        ("backbone.layers.0.blocks.0.attn.relative_position_bias_table", (121, 3), False),
    ],
)
def test_the_published_no_decay_rule(name, shape, expected):
    assert decays(name, nn.Parameter(torch.zeros(shape))) is expected


def test_the_shape_of_a_partitioned_parameter_is_its_ds_shape():
    parameter = nn.Parameter(torch.empty(0))  # what ZeRO-3 leaves in place
    assert not decays("fc.weight", parameter)
    parameter.ds_shape = torch.Size((4, 4))
    assert decays("fc.weight", parameter)


def test_groups_hold_every_trainable_parameter_once():
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    module[2].weight.requires_grad = False
    groups = {group["name"]: group for group in parameter_groups(module, 0.05)}
    assert [id(p) for p in groups["decay"]["params"]] == [id(module[0].weight)]
    assert len(groups["no_decay"]["params"]) == 4
    assert (groups["decay"]["weight_decay"], groups["no_decay"]["weight_decay"]) == (0.05, 0.0)


def test_an_empty_group_is_left_out():
    assert [group["name"] for group in parameter_groups(nn.LayerNorm(3), 0.05)] == ["no_decay"]


def optimizer_of(parameter, *, guards=True, clip=None, form="auto"):
    groups = [{"params": [parameter], "weight_decay": 0.0}]
    return build_adamw(groups, OptimizerConfig(clip_grad=clip), choose_optimizer(form, device=CPU), guards=guards)


def test_nothing_happens_before_it_is_armed():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(parameter, guards=False)
    set_learning_rate(optimizer, 0.1)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert not optimizer.state[parameter], "even a step with zero gradients would advance Adam's count"
    optimizer.armed = True
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_leave_parameters_and_state_alone(bad, clip, form):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(parameter, clip=clip, form=form)
    optimizer.armed = True
    set_learning_rate(optimizer, 0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    before = {
        "parameter": parameter.detach().clone(),
        **{name: value.clone() for name, value in optimizer.state[parameter].items()},
    }
    parameter.grad = torch.tensor([1.0, bad, 1.0])
    optimizer.step()
    assert not torch.isfinite(optimizer.last_norm)
    for name, value in {"parameter": parameter, **optimizer.state[parameter]}.items():
        assert torch.equal(value, before[name]), name
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.isfinite(optimizer.last_norm)
    assert optimizer.state[parameter]["step"] == 2


@pytest.mark.parametrize("form", FORMS)
def test_the_norm_is_measured_before_clipping_and_the_moments_see_the_clipped_gradient(form):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = optimizer_of(parameter, clip=1.0, form=form)
    optimizer.armed = True
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert float(optimizer.last_norm) == pytest.approx(5.0)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.tensor([0.06, 0.08]))


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_below_the_clipping_norm_is_not_scaled(form):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = optimizer_of(parameter, clip=100.0, form=form)
    optimizer.armed = True
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.tensor([0.3, 0.4]))


def test_a_norm_that_was_measured_elsewhere_decides():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = optimizer_of(parameter, clip=1.0)
    optimizer.armed = True
    optimizer.measured_norm = torch.tensor(10.0)  # over all ranks, of which this one holds a part
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.tensor([0.03, 0.04]))
    optimizer.measured_norm = torch.tensor(float("inf"))  # another rank's part was not finite
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


def test_the_learning_rate_is_scaled_by_group():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [p], "weight_decay": 0.0, "lr_scale": scale} for p, scale in zip(parameters, (1.0, 0.5), strict=True)]
    optimizer = build_adamw(groups, OptimizerConfig(), choose_optimizer("auto", device=CPU), guards=False)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
