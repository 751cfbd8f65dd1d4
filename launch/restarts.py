"""Starting again after a failure: each start goes on from the last complete save."""

import select
import sys
import time
from collections.abc import Callable

from launch.outcome import FINISHED, PREEMPTED, USER_ERROR
from launch.processes import PASSED_ON, read_signals, watch_signals

NONFINITE = 3  # simmim's code for a loss that stayed non-finite: another start would meet the same numbers
FIRST_DELAY, LONGEST_DELAY = 5.0, 120.0  # seconds before a start; doubled each time: what broke may need time


def run_with_restarts(start: Callable[[], tuple[int, bool]], *, most: int) -> int:
    """Starts the job, and again after a failure.

    Args:
        start: runs the job once; returns its exit code, and whether somebody outside asked for its end.
        most: how often it is started again at most.

    Returns:
        The exit code of the last start.
    """
    delay = FIRST_DELAY
    for restart in range(most + 1):
        code, requested = start()
        # A user error of a later start is none of the user's: most likely the one before has not quite ended on some node.
        fine = (FINISHED, PREEMPTED, NONFINITE) if restart else (FINISHED, PREEMPTED, NONFINITE, USER_ERROR)
        if code in fine or requested or restart == most:
            return code
        sys.stderr.write(f"launch: failed with exit code {code}; restart {restart + 1} of {most} in {delay:g} seconds.\n")
        if _interrupted(delay):
            sys.stderr.write("launch: stopped while waiting to restart; the same command goes on from the last complete save.\n")
            return PREEMPTED
        delay = min(2 * delay, LONGEST_DELAY)
    return code


def _interrupted(seconds: float) -> bool:
    signals = watch_signals(PASSED_ON)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([signals], [], [], left)[0] and any(number in PASSED_ON for number in read_signals(signals)):
            return True
    return False
