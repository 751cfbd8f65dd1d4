"""Stop signals are noted and the handlers of before come back."""

import os
import signal

import pytest

from simmim_scale.train.stop import StopRequest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted_by_name(name):
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.received == name


def test_a_second_ctrl_c_leaves_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_of_before_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before
