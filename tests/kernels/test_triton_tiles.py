"""The cut into tiles: covers every window with little padding, and what is not supported is refused with a reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmim_scale.kernels.window_attention.triton_tiles import (
    SHARED_MEMORY,
    PairTiles,
    choose_tiles,
    key_sizes,
    key_starts,
    padded_head_dim,
    refuse,
)


@given(tokens=st.integers(1, 576), largest=st.sampled_from([16, 32, 64, 128, 256]))
def test_tiles_of_keys_cover_the_window_with_fewer_than_16_to_spare(tokens, largest):
    sizes = key_sizes(tokens, largest)
    assert tokens <= sum(sizes) < tokens + 16
    assert all(size & (size - 1) == 0 and 16 <= size <= largest for size in sizes)
    assert key_starts(sizes) == tuple(sum(sizes[:i]) for i in range(len(sizes)))


def test_published_windows_are_cut_as_meant():
    assert key_sizes(144, 128) == (128, 16)
    assert key_sizes(36, 128) == (32, 16)
    assert key_sizes(196, 128) == (128, 64, 16)
    assert key_sizes(400, 128) == (128, 128, 128, 16)


@given(
    tokens=st.integers(1, 576),
    head_dim=st.sampled_from([16, 32, 44, 64, 88, 96, 128]),
    itemsize=st.sampled_from([2, 4]),
    capability=st.sampled_from(list(SHARED_MEMORY)),
)
def test_tiles_cover_all_queries_and_keys(tokens, head_dim, itemsize, capability):
    tiles = choose_tiles(tokens, head_dim, itemsize, capability)
    forward = tiles.forward
    if isinstance(forward, PairTiles):
        assert forward.part is not None
        return
    assert tiles.pair.part is None
    assert sum(forward.keys) >= tokens
    assert forward.tiles == 1 or forward.block * (forward.tiles - 1) < tokens <= forward.block * forward.tiles
    assert tiles.query is None or sum(tiles.query.keys) >= tokens
    assert padded_head_dim(head_dim) >= max(head_dim, 16)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "capability", "message"),
    [
        (577, 32, (9, 0), "576 tokens at most, got 577"),
        (144, 160, (9, 0), "head dims from 16 to 128"),
        (144, 42, (9, 0), "in steps of 4 are supported, got 42"),
        (144, 12, (9, 0), "head dims from 16 to 128"),
        (144, 32, (7, 5), r"compute capability 7\.5, only for 8\.0"),
    ],
)
def test_what_is_not_supported_is_refused_with_a_reason(tokens, head_dim, capability, message):
    with pytest.raises(ValueError, match=message):
        raise ValueError(refuse(tokens, head_dim, capability))


def test_what_is_supported_is_not_refused():
    for capability in SHARED_MEMORY:
        for head_dim in (16, 32, 44, 64, 88, 96, 128):
            assert refuse(576, head_dim, capability) is None
