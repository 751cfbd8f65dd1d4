"""The order of samples: exactly once per epoch, equal batches, independent of world size and of resumes, local to a node."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim_scale.data.order import BatchShare, SampleOrder, bit_reversal, num_lanes
from simmim_scale.data.random import Stream, sample_rng

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=7)  # samples of every shard
MIXED = st.sampled_from([1, 2, 3, 5, 8, 64])  # shards
SPLITS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))  # micro-batch, accumulation, world size


@settings(max_examples=500, deadline=None)
@given(sizes=SIZES, mixed=MIXED, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_has_every_sample_once(sizes, mixed, seed, epoch):
    n = sum(sizes)
    order = SampleOrder(sizes, seed=seed, mixed_shards=mixed)
    assert sorted(order.ids(epoch * n, (epoch + 1) * n)) == list(range(n))


@settings(deadline=None)
@given(sizes=SIZES, mixed=MIXED, cuts=st.lists(st.integers(0, 200), min_size=2, max_size=8))
def test_the_stream_does_not_depend_on_how_it_is_read(sizes, mixed, cuts):
    whole = SampleOrder(sizes, seed=3, mixed_shards=mixed).ids(0, 200)
    order = SampleOrder(sizes, seed=3, mixed_shards=mixed)
    for start, stop in pairwise(cuts):
        low, high = sorted((start, stop))
        assert np.array_equal(order.ids(low, high), whole[low:high])


def rounds_of_all_ranks(split, start, lanes):
    """The (accumulation, micro_batch) positions of every rank in one step."""
    micro, accumulation, world = split
    batch = micro * accumulation * world
    return [BatchShare(batch, micro, accumulation, rank, world, lanes).rounds(start) for rank in range(world)]


@given(split=SPLITS, start=st.integers(0, 10**9), lanes=st.sampled_from([1, 2, 16, 64]))
def test_the_shares_of_a_step_are_its_positions(split, start, lanes):
    rounds = rounds_of_all_ranks(split, start, lanes)
    assert {each.shape for each in rounds} == {(split[1], split[0])}
    assert sorted(np.concatenate(rounds).ravel()) == list(range(start, start + split[0] * split[1] * split[2]))


@settings(max_examples=2000, deadline=None)
@given(
    sizes=SIZES,
    mixed=MIXED,
    seed=st.integers(0, 1000),
    first=st.integers(0, 100),
    runs=st.lists(st.tuples(SPLITS, st.integers(1, 4)), min_size=1, max_size=4),
)
def test_epochs_stay_exact_over_resumes_with_other_ranks_and_batches(sizes, mixed, seed, first, runs):
    """Every run resumes where the last one stopped, with an order of its own: nothing is left out and nothing is seen twice."""
    n = sum(sizes)
    position, used = first * n, []
    for split, steps in runs:
        order = SampleOrder(sizes, seed=seed, mixed_shards=mixed)
        batches = []
        for _ in range(steps):
            rounds = rounds_of_all_ranks(split, position, order.lanes)
            assert len({each.size for each in rounds}) == 1
            batches.append(np.concatenate(rounds).ravel())
            position += len(batches[-1])
        positions = np.concatenate(batches)
        used.extend(zip(positions.tolist(), order.at(positions).tolist(), strict=True))
    samples = [sample for _, sample in sorted(used)]
    for epoch in range(len(samples) // n):
        assert sorted(samples[epoch * n : (epoch + 1) * n]) == list(range(n))
    rest = samples[len(samples) // n * n :]
    assert len(set(rest)) == len(rest)


@pytest.mark.parametrize("batch", [8, 48, 256, 2048])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_node_touches_only_its_part_of_an_epochs_shards(batch, world):
    order = SampleOrder([64] * 128, seed=0)
    n = order.num_samples
    for epoch in (0, 3):
        touched = []
        for rank in range(world):
            share = BatchShare(batch, batch // world, 1, rank, world, order.lanes)
            first = -(-epoch * n // batch) * batch
            positions = np.concatenate([share.rounds(start)[0] for start in range(first, first + n - batch, batch)])
            shards = set((order.at(positions[order.epochs(positions) == epoch]) // 64).tolist())
            touched.append(len(shards))
        assert max(touched) <= 128 // world + 2


def test_shards_in_play_are_bounded_and_announced():
    order = SampleOrder([100] * 80, seed=0, mixed_shards=8)
    for start in range(0, 7200, 400):
        positions = np.arange(start, start + 400)
        blocks = order.blocks_in_play(positions)
        known = {shard for block in blocks for shard in order.shards_of(block)}
        assert set((order.at(positions) // 100).tolist()) <= known
        assert len(known) < 80 / 2
        upcoming = {order.block_after(block) for block in order.blocks_in_play(positions[-8:])}
        later = set(order.blocks_in_play(np.arange(start + 400, start + 800))) - set(blocks)
        assert later <= upcoming


def test_blocks_of_different_lanes_end_at_different_times():
    order = SampleOrder([100] * 80, seed=0, mixed_shards=8)
    shards = [{s for b in order.blocks_in_play(np.arange(p, p + 8)) for s in order.shards_of(b)} for p in range(0, 8000, 8)]
    assert max(len(after - before) for before, after in pairwise(shards)) <= 4


def test_any_position_is_reached_at_once():
    order = SampleOrder([10_000] * 128, seed=0)
    share = BatchShare(2048, 64, 4, 3, 8, order.lanes)
    start = time.perf_counter()
    order.at(share.rounds(10**12)[0])
    assert time.perf_counter() - start < 1  # 0.01 s on an idle core


def test_epochs_and_seeds_are_shuffled_differently():
    sizes = [100] * 5
    n = sum(sizes)
    order = SampleOrder(sizes, seed=0)
    first, second = order.ids(0, n), order.ids(n, 2 * n)
    other = SampleOrder(sizes, seed=1).ids(0, n)
    validation = SampleOrder(sizes, seed=0, stream=Stream.VALIDATION_ORDER).ids(0, n)
    for a, b in [(first, second), (first, other), (first, validation), (first, np.arange(n))]:
        # Two random permutations agree in about one place.
        assert (a == b).sum() < 10


def test_epochs_of_positions():
    assert SampleOrder(4, seed=0).epochs(np.arange(2, 10)).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_memory_stays_bounded():
    order = SampleOrder([5] * 20, seed=0, mixed_shards=4)
    order.ids(0, 5000)
    assert len(order._blocks) <= 2 * order.lanes
    assert len(order._lines) <= 2


def test_lanes():
    assert bit_reversal(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert bit_reversal(1).tolist() == [0]
    assert [num_lanes(mixed) for mixed in (1, 2, 3, 7, 8, 64, 1000)] == [1, 2, 2, 4, 8, 64, 64]


FIXED = [7, 5, 6, 1, 4, 0, 3, 2, 7, 3, 5, 1, 4, 2, 6, 0]
FIXED_BLOCKS = [5, 1, 4, 0, 2, 6, 3, 7, 10, 8, 11, 9]


def test_the_seeded_order_is_fixed():
    # A change of these numbers means that runs cannot be resumed across it.
    assert SampleOrder([3, 5], seed=5).ids(0, 16).tolist() == FIXED
    assert SampleOrder([2] * 6, seed=5, mixed_shards=2).ids(12, 24).tolist() == FIXED_BLOCKS
    assert sample_rng(1, 2, 3, Stream.VIEW).random() == 0.983624011907764


def test_wrong_arguments():
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0, seed=0)
    with pytest.raises(ValueError, match="mixed_shards: expected at least 1"):
        SampleOrder(3, seed=0, mixed_shards=0)
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


@pytest.mark.parametrize("words", [(0, 0, 0), (2**32 - 1, 1, 5), (2**32, 1, 5), (3, 2**40, 9)])
def test_a_generator_is_that_of_its_numbers_on_both_sides_of_32_bits(words):
    seed, epoch, sample = words
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(Stream.MASK), epoch, sample))))
    assert sample_rng(*words, Stream.MASK).random() == expected.random()
