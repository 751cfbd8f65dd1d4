"""What the supervisor of a node makes of an end of DeepSpeed's launcher."""

import signal
import socket
from types import SimpleNamespace

import pytest

from launch.channel import Channel, remove_directory_of
from launch.cli import make_job
from launch.outcome import Ending
from launch.supervisor import RankState, Supervisor


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    built = Supervisor(make_job(["--ranks", "2", "--log-dir", str(tmp_path), "--", "x"], program=["p.py"]), {})
    ours, theirs = socket.socketpair()
    built.running[1] = RankState(rank=1, keeper=1, channel=Channel(ours))
    built.launcher = SimpleNamespace(poll=lambda: 1)
    yield built
    built.selector.close()
    theirs.close()
    remove_directory_of(built.socket_path)


def test_a_launcher_that_was_killed_is_somebodys_request(supervisor):
    supervisor._look_for_launcher()
    assert supervisor.requested
    assert supervisor.stopping.asked == [signal.SIGTERM]


def test_a_launcher_that_ended_after_a_failure_is_none(supervisor):
    supervisor.endings.append(Ending(rank=0, status=-signal.SIGKILL))
    supervisor._look_for_launcher()
    assert not supervisor.requested  # so `--max-restarts` starts again
    assert supervisor.stopping.asked == [signal.SIGTERM]


def test_as_long_as_it_runs_nothing_is_asked(supervisor):
    supervisor.launcher = SimpleNamespace(poll=lambda: None)
    supervisor._look_for_launcher()
    assert not supervisor.stopping.asked
