"""The plan's arithmetic, against independent computations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from simmim_scale.config.plan import make_plan, split_batch
from simmim_scale.config.schema import CosineConfig, MultiStepConfig, OptimizerConfig, StepConfig, TrainConfig

IMAGENET = 1_281_167


def plan(schedule, *, epochs=100.0, steps=None, batch=2048, base_lr=1e-4, samples=IMAGENET, world=1, micro=None):
    train = TrainConfig(epochs=None if steps else epochs, steps=steps, global_batch=batch, micro_batch=micro)
    return make_plan(train, OptimizerConfig(base_lr=base_lr), schedule, num_samples=samples, world_size=world)


def test_published_learning_rates_at_batch_2048():
    made = plan(CosineConfig(warmup_epochs=10, warmup_lr=1e-6, min_lr=1e-5), base_lr=2e-4)
    assert made.learning_rate.peak == pytest.approx(8e-4)
    assert made.lr(0) == pytest.approx(4e-6)


def test_step_schedule_drops_at_90_and_95_percent():
    made = plan(StepConfig(warmup_epochs=10, warmup_lr=0), base_lr=2e-4, samples=2048 * 625)
    assert made.total_steps == 62_500
    rates = np.array([made.lr(step) for step in range(made.total_steps)])
    drops = np.flatnonzero(np.diff(rates) < 0) + 1
    assert drops.tolist() == [56_250, 59_375]
    np.testing.assert_allclose(rates[[0, 3125, 6250, 56_249, 56_250, 59_375]], [0, 4e-4, 8e-4, 8e-4, 8e-5, 8e-6])


def test_multistep_drops_at_epoch_700_of_800():
    made = plan(MultiStepConfig(warmup_epochs=10), epochs=800, samples=2048 * 625)
    assert made.lr(700 * 625 - 1) == pytest.approx(4e-4)
    assert made.lr(700 * 625) == pytest.approx(4e-5)


@pytest.mark.parametrize("prefix", [False, True])
def test_cosine_equals_timm_at_a_thousand_points(prefix):
    import torch
    from timm.scheduler import CosineLRScheduler

    made = plan(CosineConfig(warmup_epochs=20, warmup_lr=2.5e-7, min_lr=2.5e-7, warmup_prefix=prefix), base_lr=1.25e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=made.learning_rate.peak)
    warmup = made.learning_rate.warmup_steps
    timm = CosineLRScheduler(
        optimizer,
        t_initial=made.total_steps - warmup if prefix else made.total_steps,
        lr_min=1e-6,
        warmup_lr_init=1e-6,
        warmup_t=warmup,
        t_in_epochs=False,
        cycle_limit=1,
        warmup_prefix=prefix,
    )
    for step in np.linspace(0, made.total_steps - 1, 1000).astype(int):
        assert made.lr(int(step)) == pytest.approx(timm._get_lr(int(step))[0], rel=1e-9)


@given(batch=st.integers(1, 600), world=st.integers(1, 40), micro=st.none() | st.integers(1, 64))
def test_a_split_batch_multiplies_back(batch, world, micro):
    if batch % world:
        with pytest.raises(ValueError, match="multiple of the number of ranks"):
            split_batch(batch, world_size=world, at_most=micro)
        return
    size, rounds = split_batch(batch, world_size=world, at_most=micro)
    assert size * rounds * world == batch
    assert micro is None or size <= micro
    larger = [s for s in range(size + 1, min(micro or batch, batch // world) + 1) if (batch // world) % s == 0]
    assert not larger


@given(samples=st.integers(8, 5000), batch=st.integers(1, 512), epochs=st.floats(0.5, 30))
def test_a_run_sees_the_epochs_asked_for_and_not_one_batch_more(samples, batch, epochs):
    assume(batch <= samples)
    made = plan(StepConfig(warmup_epochs=0), epochs=epochs, samples=samples, batch=batch)
    seen = made.total_steps * batch
    assert seen >= math.floor(epochs * samples * (1 - 1e-9))
    assert seen - batch < epochs * samples or made.total_steps == 1


@given(
    steps=st.integers(20, 3000),
    warmup=st.floats(0, 5),
    schedule=st.sampled_from(["cosine", "step", "multistep"]),
)
def test_every_rate_lies_between_the_floor_and_the_peak(steps, warmup, schedule):
    made_schedule = {
        "cosine": CosineConfig(warmup_epochs=warmup, min_lr=1e-6, warmup_lr=1e-6),
        "step": StepConfig(warmup_epochs=warmup, warmup_lr=1e-6),
        "multistep": MultiStepConfig(warmup_epochs=warmup, warmup_lr=1e-6, milestone_epochs=(6.0, 8.0)),
    }[schedule]
    samples, batch = 1000, 100
    if round(warmup * 10) >= min(steps, round(0.9 * steps)):
        return
    made = plan(made_schedule, steps=steps, samples=samples, batch=batch)
    rates = [made.lr(step) for step in range(steps)]
    assert all(0 <= rate <= made.learning_rate.peak * (1 + 1e-12) for rate in rates)
    after = rates[made.learning_rate.warmup_steps :]
    assert all(later <= earlier + 1e-18 for earlier, later in itertools.pairwise(after))


def test_key_steps_carry_the_rate_of_their_update():
    made = plan(StepConfig(warmup_epochs=1), samples=1000, batch=100, epochs=10.0)
    rows = made.as_json()["learning_rate"]
    assert [row["step"] for row in rows] == [1, 11, 90, 91, 95, 96, 100]
    assert [row["lr"] for row in rows] == [made.lr(row["step"] - 1) for row in rows]


def test_too_few_samples_for_a_global_batch():
    with pytest.raises(ValueError, match="2048 for 100 samples"):
        plan(StepConfig(), samples=100)


def test_warm_up_longer_than_the_run():
    with pytest.raises(ValueError, match="shorter than the run"):
        plan(StepConfig(warmup_epochs=10), epochs=5.0)


def test_a_drop_inside_the_warm_up():
    with pytest.raises(ValueError, match="inside the warm-up"):
        plan(MultiStepConfig(warmup_epochs=10, milestone_epochs=(5.0,)), epochs=20.0)


def test_positions_and_epochs_follow_the_step():
    made = plan(StepConfig(warmup_epochs=0), samples=250, batch=100, epochs=4.0)
    assert made.total_steps == 10
    assert made.position_at(3) == 300
    assert made.epoch_at(5) == 2.0
