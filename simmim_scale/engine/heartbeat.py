"""The heartbeat of a rank: one line in a file of this node, by which `python -m launch` sees that it lives and gets on.

The file named by SIMMIM_HEARTBEAT gets `now marks marked_at step phase` (times of the monotonic clock), once a second by a thread
and at every mark. On SIGUSR2 the stacks of all threads go to the file beside it. Without the variable nothing happens at all.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Mapping

VARIABLE = "SIMMIM_HEARTBEAT"
STACKS = ".stacks"
EVERY_SECONDS = 1.0


class Heartbeat:
    """Tells where this rank is.

    Args:
        path: the file, usually of `from_environment`; None for nobody who listens.
    """

    def __init__(self, path: str | None = None) -> None:
        self._lock = threading.Lock()
        self._marks, self._marked_at, self._step, self._phase = 0, time.monotonic(), 0, "start"
        self._descriptor: int | None = None
        if path is None:
            return
        # Kept open for good: the handler writes to it whatever state the process is in.
        self._stacks = open(path + STACKS, "w")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._write()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Heartbeat":
        return cls(environment.get(VARIABLE))

    def mark(self, phase: str, step: int | None = None) -> None:
        """Progress: this rank now begins `phase`, one word.

        Args:
            step: the last one that is finished; given once this start has done one, since the first takes longest.
        """
        with self._lock:
            self._marks += 1
            self._marked_at, self._phase = time.monotonic(), phase
            self._step = self._step if step is None else step
        self._write()

    def _beat(self) -> None:
        while True:
            time.sleep(EVERY_SECONDS)
            self._write()

    def _write(self) -> None:
        if self._descriptor is None:
            return
        with self._lock:
            text = f"{time.monotonic():.3f} {self._marks} {self._marked_at:.3f} {self._step} {self._phase}\n"
            # padded, so that a shorter line covers a longer one: a reader always finds one whole line
            os.pwrite(self._descriptor, text.encode().rjust(128), 0)
