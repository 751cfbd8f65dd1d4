"""What counts as a spike, and which samples a run has passed over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simmim_scale.train.rollbacks import ROLLBACKS_FILE, Rollback, add_rollback, read_rollbacks, skipped_at
from simmim_scale.train.spikes import SpikeDetector


def feed(detector, losses):
    return [detector.observe(loss) for loss in losses]


def test_a_spike_needs_patience_and_is_told_in_words():
    detector = SpikeDetector(factor=2.0, window=10, patience=3)
    assert feed(detector, [1.0, 1.1, 0.9, 1.0, 1.0]) == [None] * 5
    assert feed(detector, [5.0, 5.0]) == [None, None]
    assert detector.suspicious
    assert detector.observe(6.0) == "loss 6 for 3 steps, above 2 times the usual 1"


def test_one_bad_batch_is_forgotten_and_does_not_raise_the_median():
    detector = SpikeDetector(factor=2.0, window=10, patience=3)
    feed(detector, [1.0] * 10)
    for _ in range(20):
        assert feed(detector, [9.0, 9.0, 1.0]) == [None] * 3
        assert not detector.suspicious


def test_nothing_is_a_spike_before_half_the_window_is_known():
    detector = SpikeDetector(factor=1.5, window=10, patience=1)
    assert feed(detector, [1.0, 9.0, 1.0, 9.0]) == [None] * 4
    assert SpikeDetector(factor=1.5, window=2, patience=1).observe(1.0) is None


def test_losses_before_a_start_are_remembered():
    detector = SpikeDetector(factor=2.0, window=4, patience=1)
    detector.remember([9.0, 1.0, 1.0, 1.0, 1.0])
    assert detector.observe(3.0) is not None


@given(st.lists(st.floats(0.5, 0.99), min_size=1, max_size=60), st.integers(1, 5))
def test_losses_within_the_factor_are_never_a_spike(losses, patience):
    assert not any(feed(SpikeDetector(factor=2.0, window=8, patience=patience), losses))


def test_rollbacks_are_kept_and_count_from_the_save_they_went_back_to(tmp_path):
    assert read_rollbacks(tmp_path) == []
    first, second = Rollback(30, 20, "spike", 160), Rollback(55, 50, "spike", 80)
    add_rollback(tmp_path, first)
    add_rollback(tmp_path, second)
    found = read_rollbacks(tmp_path)
    assert found == [first, second]
    assert [skipped_at(found, step) for step in (0, 10, 20, 49, 50, 90)] == [0, 0, 160, 160, 240, 240]


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / ROLLBACKS_FILE).write_text('[{"from_step": 3')
    with pytest.raises(ValueError, match="which samples were passed over"):
        read_rollbacks(tmp_path)
