"""Which ends are followed by another start."""

import os
import signal
import threading

import pytest

from launch import restarts
from launch.restarts import run_with_restarts


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr(restarts, "FIRST_DELAY", 0.01)


def ends(*results: tuple[int, bool] | int):
    """A start that ends like this, one result after another; and how often it was called."""
    calls = []

    def start() -> tuple[int, bool]:
        result = results[len(calls)]
        calls.append(result)
        return result if isinstance(result, tuple) else (result, False)

    return start, calls


@pytest.mark.parametrize(
    ("results", "most", "code", "starts"),
    [
        ((0,), 3, 0, 1),
        ((75,), 3, 75, 1),
        ((2,), 3, 2, 1),
        ((3,), 3, 3, 1),
        ((1, 137, 0), 3, 0, 3),
        ((76, 0), 1, 0, 2),
        ((1, 1, 1), 2, 1, 3),
        ((1,), 0, 1, 1),
        ((1, 2, 0), 5, 0, 3),  # the run directory was still claimed by what the first start left
        (((137, True),), 5, 137, 1),  # asked to stop, and killed since it did not
    ],
)
def test_what_is_started_again(results, most, code, starts):
    start, calls = ends(*results)
    assert run_with_restarts(start, most=most) == code
    assert len(calls) == starts


def test_a_signal_between_two_starts_ends_it(monkeypatch, capsys):
    monkeypatch.setattr(restarts, "FIRST_DELAY", 60.0)
    start, calls = ends(1, 0)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_with_restarts(start, most=1) == 75
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(-1)
    assert len(calls) == 1
    assert "stopped while waiting" in capsys.readouterr().err
