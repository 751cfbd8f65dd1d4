"""Gives the optimizer the learning rate of a step; the curve itself is the plan's (`config/plan.py`)."""

from typing import Any


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set `lr` on every parameter group, times the group's `lr_scale` (layer decay).

    Done before each step, from the step's number, rather than by a scheduler object: there is no second counter that a
    skipped step or a resume could put out of step.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
