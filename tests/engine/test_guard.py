"""Naming the module that broke, and giving up after too many skipped steps."""

import pytest
import torch
from torch import nn

from simmim_scale.engine.guard import LossScaleError, NonFiniteError, NonFiniteGuard, first_nonfinite_module


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return {"y": self.inner(x), "index": torch.arange(3)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Block()
        self.second = Block()

    def forward(self, x):
        return self.second(self.first(x)["y"])


def test_the_innermost_first_module_is_named():
    model = Model()
    with torch.no_grad():
        model.second.inner.weight[0, 0] = float("nan")
    assert first_nonfinite_module(model, lambda: model(torch.ones(1, 2))) == "second.inner"
    assert first_nonfinite_module(model, lambda: model(torch.full((1, 2), torch.inf))) == "first.inner"


def test_a_finite_forward_names_nothing_and_leaves_no_hooks():
    model = Model()
    assert first_nonfinite_module(model, lambda: model(torch.ones(1, 2))) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_go_even_when_the_forward_fails():
    model = Model()
    with pytest.raises(RuntimeError):
        first_nonfinite_module(model, lambda: model(torch.ones(1, 3)))
    assert not any(module._forward_hooks for module in model.modules())


def test_it_gives_up_after_the_limit_in_a_row_only():
    guard = NonFiniteGuard(limit=2)
    guard.nonfinite(1, "a")
    guard.finite()
    guard.nonfinite(3, "a")
    with pytest.raises(NonFiniteError, match=r"step 4: .* 2 steps in a row, first in b"):
        guard.nonfinite(4, "b")
    assert guard.total == 3


def test_the_count_survives_a_resume():
    guard, resumed = NonFiniteGuard(limit=2), NonFiniteGuard(limit=2)
    guard.nonfinite(1, "a")
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteError):
        resumed.nonfinite(2, "a")


def test_the_floor_of_the_loss_scale_comes_with_advice():
    with pytest.raises(LossScaleError, match=r"step 7: .* loss scale of 1, .*bf16"):
        NonFiniteGuard(limit=9).overflow_at_floor(7, 1.0)
