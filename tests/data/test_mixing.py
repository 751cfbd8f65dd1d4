"""How well an epoch is mixed, each time against full permutations of the same samples, which a node could not read locally.

The shards are sorted by class, the worst that can be given. Statistics over all batches of an epoch:

- surprise: variance of the number of a batch's samples that come from one shard, over that of a full permutation. 1 is a full
  permutation, more means that shards clump together, less that batches are more even than chance.
- company: how often two samples of one batch are together again in a batch of the next epoch, over chance.
- drift: how far the mean place of a shard's samples in the epoch moves from the middle, against that of a full permutation.
"""

import numpy as np
import pytest

from simmim_scale.data.order import SampleOrder

SHARDS, PER_SHARD, BATCH = 48, 170, 255  # nothing divides the lanes, as in real sets
N = SHARDS * PER_SHARD


def surprise(ids):
    counts = np.stack([np.bincount(batch // PER_SHARD, minlength=SHARDS) for batch in ids.reshape(-1, BATCH)])
    expected = BATCH / SHARDS * (1 - 1 / SHARDS) * (N - BATCH) / (N - 1)  # hypergeometric
    return ((counts - BATCH / SHARDS) ** 2).mean() / expected


def company(first, second):
    batch_of = np.empty(N, dtype=np.int64)
    batch_of[second] = np.arange(N) // BATCH
    together = sum(
        (np.bincount(batch_of[batch]) * (np.bincount(batch_of[batch]) - 1)).sum() for batch in first.reshape(-1, BATCH)
    )
    return together / (N * (BATCH - 1) * (BATCH - 1) / (N - 1))


def drift(ids):
    places = np.empty(N)
    places[ids] = (np.arange(N) + 0.5) / N
    return places.reshape(SHARDS, PER_SHARD).mean(1).std() / np.sqrt(1 / 12 / PER_SHARD)


def neighbours(ids):
    """Share of samples that are followed by one of the same shard, over chance."""
    return (np.diff(ids // PER_SHARD) == 0).mean() * SHARDS


def measure(mixed_shards, statistic, *, epochs=4):
    order = SampleOrder([PER_SHARD] * SHARDS, seed=0, mixed_shards=mixed_shards)
    ids = [order.ids(epoch * N, (epoch + 1) * N) for epoch in range(epochs + 1)]
    if statistic is company:
        return np.mean([company(ids[epoch], ids[epoch + 1]) for epoch in range(epochs)])
    return np.mean([statistic(each) for each in ids[:epochs]])


def full(statistic, *, epochs=4):
    rng = np.random.default_rng(0)
    ids = [rng.permutation(N) for _ in range(epochs + 1)]
    if statistic is company:
        return np.mean([company(ids[epoch], ids[epoch + 1]) for epoch in range(epochs)])
    return np.mean([statistic(each) for each in ids[:epochs]])


def test_the_statistics_know_a_full_permutation_and_a_sorted_set():
    for statistic in (surprise, company, drift):
        assert full(statistic) == pytest.approx(1, abs=0.1), statistic
    assert full(neighbours) == pytest.approx(1, abs=0.2)
    assert surprise(np.arange(N)) > 50
    assert neighbours(np.arange(N)) > 40
    assert company(np.arange(N), np.arange(N)) == pytest.approx(N / BATCH, rel=0.1)


def test_sets_that_are_mixed_as_a_whole_are_as_good_as_a_full_permutation():
    """Even better: every batch has nearly equally many of every shard, and every shard is spread over the whole epoch."""
    assert measure(256, surprise) < 0.5
    assert measure(256, company) == pytest.approx(1, abs=0.1)
    assert measure(256, drift) < 1
    assert measure(256, neighbours) < 1


def test_every_sample_may_come_at_any_time():
    order = SampleOrder([PER_SHARD] * SHARDS, seed=1)
    places = np.empty((24, N))
    for epoch in range(24):
        places[epoch, order.ids(epoch * N, (epoch + 1) * N)] = np.arange(N) / N
    # Mean and spread over epochs of the place of each sample: those of a uniform draw.
    assert places.mean(0).std() == pytest.approx(np.sqrt(1 / 12 / 24), rel=0.1)
    assert places.std(0).mean() == pytest.approx(np.sqrt(1 / 12), rel=0.04)


def test_fewer_mixed_shards_trade_mixing_for_locality():
    """With a quarter of the shards in play a batch still comes from all of these, in equal parts."""
    surprises = [measure(mixed, surprise) for mixed in (4, 16, 32)]
    assert surprises == sorted(surprises, reverse=True)
    assert surprises[1] < 10  # counts vary three times as much as by chance, for shards of one class each
    assert measure(16, company) == pytest.approx(1, abs=0.1)
    assert measure(16, neighbours) < 1
