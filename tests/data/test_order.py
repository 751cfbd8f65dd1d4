"""The order of samples: exactly once per epoch, equal batches, independent of world size and of resumes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmim_scale.data.order import BatchShare, SampleOrder
from simmim_scale.data.random import Stream, sample_rng

SPLITS = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))  # micro-batch, accumulation, world size


@given(n=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_has_every_sample_once(n, seed, epoch):
    assert sorted(SampleOrder(n, seed=seed).ids(epoch * n, (epoch + 1) * n)) == list(range(n))


@given(n=st.integers(1, 40), cuts=st.lists(st.integers(0, 200), min_size=2, max_size=8))
def test_the_stream_does_not_depend_on_how_it_is_read(n, cuts):
    whole = SampleOrder(n, seed=3).ids(0, 200)
    order = SampleOrder(n, seed=3)
    for start, stop in pairwise(cuts):
        low, high = sorted((start, stop))
        assert np.array_equal(order.ids(low, high), whole[low:high])


def step_positions(split, start):
    micro, accumulation, world = split
    shares = [BatchShare(micro * accumulation * world, micro, accumulation, rank, world) for rank in range(world)]
    return [p for round in range(accumulation) for share in shares for p in share.positions(start, round)]


@given(split=SPLITS, start=st.integers(0, 10**9))
def test_the_shares_of_a_step_are_its_positions_in_order(split, start):
    assert step_positions(split, start) == list(range(start, start + split[0] * split[1] * split[2]))


@given(n=st.integers(1, 50), splits=st.lists(st.tuples(SPLITS, st.integers(1, 6)), min_size=1, max_size=5))
def test_changing_ranks_and_batch_between_resumes_uses_every_sample_once(n, splits):
    position, used = 0, []
    order = SampleOrder(n, seed=1)
    for split, steps in splits:
        for _ in range(steps):
            positions = step_positions(split, position)
            used.extend(int(order.ids(p, p + 1)[0]) for p in positions)
            position += len(positions)
    for epoch in range(len(used) // n):
        assert sorted(used[epoch * n : (epoch + 1) * n]) == list(range(n))
    rest = used[len(used) // n * n :]
    assert len(set(rest)) == len(rest)


def test_epochs_and_seeds_are_shuffled_differently():
    n = 500
    order = SampleOrder(n, seed=0)
    first, second = order.ids(0, n), order.ids(n, 2 * n)
    other = SampleOrder(n, seed=1).ids(0, n)
    validation = SampleOrder(n, seed=0, stream=Stream.VALIDATION_ORDER).ids(0, n)
    for a, b in [(first, second), (first, other), (first, validation), (first, np.arange(n))]:
        # Two random permutations agree in about one place.
        assert (a == b).sum() < 10


def test_epochs_of_positions():
    assert SampleOrder(4, seed=0).epochs(2, 10).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_memory_stays_bounded():
    order = SampleOrder(10, seed=0)
    order.ids(0, 500)
    assert len(order._epochs) <= 2


def test_the_seeded_order_is_fixed():
    # A change of these numbers means that runs cannot be resumed across it.
    assert SampleOrder(8, seed=5).ids(0, 16).tolist() == [4, 2, 5, 0, 7, 6, 3, 1, 3, 0, 5, 1, 7, 4, 6, 2]
    assert sample_rng(1, 2, 3, Stream.VIEW).random() == 0.983624011907764


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0, seed=0)
    with pytest.raises(ValueError, match="start 3 and stop 2"):
        SampleOrder(5, seed=0).ids(3, 2)
    with pytest.raises(ValueError, match=r"global_batch: expected micro_batch.*got 10 for 2 \* 2 \* 2 = 8"):
        BatchShare(global_batch=10, micro_batch=2, accumulation=2, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        BatchShare(global_batch=8, micro_batch=2, accumulation=2, rank=2, world_size=2)


def test_streams_and_samples_have_draws_of_their_own():
    arguments = [(seed, epoch, sample, stream) for seed in (0, 1) for epoch in (0, 1) for sample in (0, 1) for stream in Stream]
    draws = {sample_rng(*each).random() for each in arguments}
    assert len(draws) == len(arguments)
