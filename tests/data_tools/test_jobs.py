"""Results come in the order of the items; a failing or dying process ends the run with its reason."""

import os
import signal

import pytest

from data_tools.jobs import available_cores, run_jobs


def square(number: int) -> int:
    if number == 13:
        raise ValueError("13 brings bad luck")
    return number * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("jobs", [1, 2])
def test_order_and_exceptions(jobs: int) -> None:
    assert list(run_jobs(square, range(12), jobs)) == [number**2 for number in range(12)]
    with pytest.raises(ValueError, match="bad luck"):
        list(run_jobs(square, range(20), jobs))


def test_a_killed_process_is_told() -> None:
    with pytest.raises(OSError, match="fewer --jobs"):
        list(run_jobs(die, range(3), 2))


def test_there_is_a_core() -> None:
    assert available_cores() >= 1
