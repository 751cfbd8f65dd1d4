"""What the supervisor of a node makes of an end of DeepSpeed's launcher."""

import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.channel import Channel, remove_directory_of
from launch.cli import make_job
from launch.outcome import Ending
from launch.supervisor import RankState, Supervisor
from launch.watch import beat_path


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


@pytest.mark.parametrize(("paused", "stalled"), [(70.0, False), (0.0, True)])
def test_a_machine_that_was_paused_accuses_no_rank(supervisor, monkeypatch, paused, stalled):
    now = time.monotonic()
    Path(beat_path(os.path.dirname(supervisor.socket_path), 1)).write_text(f"{now - 70} 7 {now - 70} 3 train")
    supervisor.running[1].pid = 2**22 + 1  # of nobody
    supervisor.resumed_at = now - 1000
    supervisor.watch_at = now - paused
    monkeypatch.setattr(supervisor, "_reports", list)
    supervisor._watch()
    assert supervisor.stalled == stalled
