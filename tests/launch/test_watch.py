"""The watchdog: which heartbeats mean trouble, and whom the report suspects."""

import os
import time
from dataclasses import replace

import pytest

from launch.stall_report import headline, render, suspects
from launch.watch import Limits, RankReport, beat_path, find_hung, process_state, report_ranks
from simmim_scale.engine.heartbeat import Heartbeat

LIMITS = Limits(heartbeat=10, stall=100, start=500)


def put(folder, rank: int, *, silent: float = 0.0, standing: float = 0.0, step: int = 1, phase: str = "train") -> None:
    now = time.monotonic()
    with open(beat_path(str(folder), rank), "w") as file:
        file.write(f"{now - silent:.3f} 7 {now - standing:.3f} {step} {phase}\n".rjust(128))


def test_all_is_well_while_ranks_get_on(tmp_path):
    put(tmp_path, 0)
    put(tmp_path, 1, silent=9, standing=99)
    put(tmp_path, 2, standing=400, step=0, phase="build")
    assert find_hung(str(tmp_path), [0, 1, 2, 3], LIMITS) is None  # 3 has no heartbeat: a program that gives none


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"silent": 11}, "rank 1 has given no heartbeat for 11 seconds"),
        ({"standing": 101, "phase": "save"}, "rank 1 has made no progress for 101 seconds, in phase 'save'"),
        ({"standing": 501, "step": 0, "phase": "meet"}, "rank 1 has made no progress for 501 seconds, in phase 'meet'"),
    ],
)
def test_what_means_trouble(tmp_path, case, words):
    put(tmp_path, 0)
    put(tmp_path, 1, **case)
    assert words in find_hung(str(tmp_path), [0, 1], LIMITS)


def test_a_silent_rank_is_named_before_those_that_wait_for_it(tmp_path):
    put(tmp_path, 0, standing=200)
    put(tmp_path, 1, silent=30, standing=200)
    assert find_hung(str(tmp_path), [0, 1], LIMITS).startswith("rank 1 ")


def test_what_was_before_a_pause_of_the_machine_does_not_count(tmp_path):
    put(tmp_path, 0, silent=70, standing=2000)
    now = time.monotonic()
    assert find_hung(str(tmp_path), [0], LIMITS, since=now - 5) is None
    assert "no heartbeat for 11 seconds" in find_hung(str(tmp_path), [0], LIMITS, since=now - 11)


WAITS = RankReport(
    rank=0,
    node="a",
    pid=10,
    state="S (sleeping)",
    silent=0.5,
    marks=20,
    standing=200.0,
    step=9,
    phase="train",
    stack="in all_reduce\n",
)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"state": "T (stopped)", "silent": 200.0, "marks": 20}, "its process does not run"),
        ({"state": "D (disk sleep)", "silent": 200.0}, "its process does not run"),
        ({"silent": 200.0}, "it gives no heartbeat"),
        ({"marks": 19, "phase": "between"}, "it is behind the others"),
    ],
)
def test_whom_the_report_suspects(other, words):
    other = replace(WAITS, **{"rank": 1, "node": "b", "pid": 11, **other})
    found, why = suspects([WAITS, other], heartbeat=10)
    assert found == [other]
    assert words in why
    text = render("rank 1 hangs", [WAITS, other], heartbeat=10)
    assert f"SUSPECT rank 1 on b (pid 11, {other.state})" in headline(text)
    assert text.index("----- rank 1") < text.index("----- rank 0")


def test_ranks_at_one_point_accuse_the_network():
    other = replace(WAITS, rank=1, node="b", pid=11)
    text = render("no progress", [WAITS, other], heartbeat=10)
    assert "NO SUSPECT: all ranks are at the same point" in headline(text)
    lost = render("lost", [WAITS], heartbeat=10, missing=["node b (10.0.0.2): silent"])
    assert headline(lost) == "LOST node b (10.0.0.2): silent"


def test_a_heartbeat_is_read_as_it_was_written_and_dumps_stacks(tmp_path):
    heartbeat = Heartbeat(beat_path(str(tmp_path), 3))
    heartbeat.mark("train", 41)
    heartbeat.mark("a_long_name_for_a_phase_of_the_run", 42)
    heartbeat.mark("save")
    (report,) = report_ranks(str(tmp_path), {3: os.getpid()}, node="here")
    assert (report.step, report.phase, report.marks) == (42, "save", 3)
    assert 0 <= report.silent < 60
    assert "test_a_heartbeat_is_read_as_it_was_written" in report.stack
    assert process_state(os.getpid())[0] in "RS"


def test_without_a_launcher_a_heartbeat_does_nothing(tmp_path):
    before = set(os.listdir("/proc/self/task"))
    Heartbeat.from_environment({}).mark("train", 1)
    assert set(os.listdir("/proc/self/task")) == before


def test_a_process_that_gives_no_heartbeat_is_never_signalled(tmp_path):
    (report,) = report_ranks(str(tmp_path), {0: os.getpid()}, node="")  # SIGUSR2 would end this process
    assert report.phase == "unknown"
    assert "no Python stack" in report.stack
