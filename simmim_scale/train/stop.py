"""A polite end: SIGTERM, SIGUSR1 and Ctrl-C ask the loop to save and leave at the next step.

Schedulers send SIGTERM (or SIGUSR1 with Slurm's --signal) some time before they kill; a second Ctrl-C leaves at once.
"""

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context manager that notes stop signals instead of dying from them.

    with StopRequest() as stop:
        ...
        if stop.received: save and leave
    """

    def __init__(self) -> None:
        self.received: str | None = None  # name of the signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
