"""When ranks are asked to stop and when they are killed: the rules that a node's supervisor and the head of many nodes share.

A request reaches every rank once per kind of signal and leaves `grace` seconds to save. After a failure the other ranks get a
moment to fail by themselves, since their messages may name the cause; then they are asked, then killed.
"""

import signal
import time

from launch.outcome import PREEMPTED, Ending

PEER_SECONDS = 15.0  # after a failure: until the other ranks are asked to stop, and again until they are killed


class Stopping:
    """What was asked, and the deadlines that follow from it.

    Args:
        grace: seconds to save after a request to stop.
    """

    def __init__(self, grace: float):
        self.grace = grace
        self.asked: list[int] = []  # signals that were passed on, in order
        self.killed = False
        self._ask_at: float | None = None
        self._kill_at: float | None = None

    def ask(self, number: int) -> bool:
        """Notes a request; False if this kind was passed on before."""
        if number in self.asked:
            return False
        self.asked.append(number)
        self.kill_within(self.grace)
        return True

    def kill_within(self, seconds: float) -> None:
        """The ranks are killed after so many seconds, unless that was to happen earlier."""
        deadline = time.monotonic() + seconds
        self._kill_at = min(self._kill_at or deadline, deadline)

    def note(self, ending: Ending, *, others: bool) -> None:
        """A rank has ended; `others` still run."""
        if ending.failed and others:
            ask_at = time.monotonic() + PEER_SECONDS
            self._ask_at = min(self._ask_at or ask_at, ask_at)
            self.kill_within(2 * PEER_SECONDS)
        elif ending.status == PREEMPTED and self._kill_at is None:
            self.kill_within(self.grace)

    def sent_by_us(self, status: int) -> bool:
        """Whether a rank that ended with this status did so because it was told to."""
        return -status in self.asked or (self.killed and status == -signal.SIGKILL)

    def time_to_ask(self) -> bool:
        """True once, when the peers of a failed rank have had their moment."""
        if self._ask_at is None or time.monotonic() <= self._ask_at:
            return False
        self._ask_at = None
        return True

    def time_to_kill(self) -> bool:
        """True once, when patience is over."""
        if self.killed or self._kill_at is None or time.monotonic() <= self._kill_at:
            return False
        self.killed = True
        return True
