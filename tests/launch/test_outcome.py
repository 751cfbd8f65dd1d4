"""From the endings of the ranks to one exit code and one message."""

import pytest

from launch.outcome import LINES_SHOWN, Ending, explain, overall_code
from launch.output import log_path


def endings(*statuses: int, by_us: tuple[int, ...] = ()) -> list[Ending]:
    """Endings in the order given; the numbers are exit codes of ranks 0, 1, ..., those in `by_us` ended by our signal."""
    return [Ending(rank=rank, status=status, by_us=rank in by_us) for rank, status in enumerate(statuses)]


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (endings(0, 0), 0),
        (endings(75, 75), 75),
        (endings(0, 75), 75),
        (endings(2, 2), 2),
        (endings(1, 2), 2),
        (endings(3, 1), 3),
        (endings(-9, 1), 137),
        (endings(75, 1), 1),
        (endings(0, -15, by_us=(1,)), 143),
        (endings(-15, 4, by_us=(0,)), 4),
        ([], 1),
    ],
)
def test_one_code_from_many(ended, code):
    assert overall_code(ended) == code


def test_failures_are_never_0_or_75():
    for status in [*range(-64, 0), 1, *range(3, 75), *range(76, 256)]:
        assert overall_code(endings(75, status, 0)) not in (0, 2, 75)


def test_nothing_is_added_to_a_run_that_finished_or_to_a_user_error_of_rank_0(tmp_path):
    assert explain(endings(0, 0), log_dir=tmp_path, asked=()) == ""
    assert explain(endings(2, 2), log_dir=tmp_path, asked=()) == ""


def test_the_end_of_a_failed_ranks_output_is_shown_from_the_last_start_only(tmp_path):
    log = log_path(tmp_path, 1)
    log.write_text("===== yesterday\nold trouble\n===== today\n" + "".join(f"line {n}\n" for n in range(100)))
    text = explain(endings(1, -6), log_dir=tmp_path, asked=())
    assert "rank 0 failed: exit code 1" in text
    assert "rank 1 failed: signal SIGABRT" in text
    assert text.count("  | ") == LINES_SHOWN
    assert "line 99" in text
    assert "old trouble" not in text
    assert "line 10\n" not in text


def test_of_many_failures_few_are_shown_and_all_are_counted(tmp_path):
    for rank in range(8):
        log_path(tmp_path, rank).write_text(f"===== start\nrank {rank} broke\n")
    text = explain(endings(*[1] * 8), log_dir=tmp_path, asked=())
    assert [rank for rank in range(8) if f"rank {rank} broke" in text] == [1, 2, 3]
    assert "8 of 8 ranks failed" in text


def test_a_stop_before_a_save_says_so(tmp_path):
    text = explain(endings(-15, -15, by_us=(0, 1)), log_dir=tmp_path, asked=[15])
    assert "stopped by SIGTERM before a complete save" in text
    assert "rank 0 (signal SIGTERM), 1 (signal SIGTERM)" in text


def test_a_missing_log_is_no_trouble(tmp_path):
    assert "rank 1 failed" in explain(endings(0, 1), log_dir=tmp_path, asked=())
