"""A node's connection to the head of a launch over many nodes: what it says, what it hears, and when it counts as lost."""

import base64
import contextlib
import os
import selectors
import time
from collections.abc import Iterator
from typing import Any

from launch.channel import Channel

READ_AT_ONCE = 32768  # bytes of output
MOST_BEHIND = 1 << 20  # bytes of output that wait for a slow head; more is left to the log file
LOST = "lost"


class HeadLink:
    """The node's end.

    Args:
        channel: connection to the head, already greeted.
        silence: seconds without a word after which it counts as lost; each end says something four times as often.
    """

    def __init__(self, channel: Channel, silence: float):
        self.channel = channel
        self.silence = silence
        self.lost: str | None = None  # why, once it is
        self._beat_at = 0.0
        self._outputs: dict[int, int] = {}  # descriptor -> 1 for stdout, 2 for stderr
        self._writers: list[int] = []
        channel.heard_at = time.monotonic()

    @property
    def alive(self) -> bool:
        return self.lost is None

    def send(self, event: str, **values: Any) -> None:
        if self.alive:
            self.channel.send({"event": event, **values})

    def hear(self) -> list[dict[str, Any]]:
        """Orders that have arrived; notices that the head is gone."""
        messages = self.channel.receive() if self.alive else []
        if self.channel.closed and self.alive:
            self.lost = "its connection closed"
        return messages

    def tick(self) -> None:
        """Regular duty: says that this node lives, and looks whether the head does."""
        now = time.monotonic()
        if self.alive and now > self._beat_at:
            self._beat_at = now + self.silence / 4
            self.send("beat")
        self.channel.flush()
        if self.alive and now - self.channel.heard_at > self.silence:
            self.lost = f"it has said nothing for {self.silence:g} seconds"

    # ------------------------------------------------------------------------------------------------- output of rank 0

    @contextlib.contextmanager
    def outputs(self, selector: selectors.BaseSelector) -> Iterator[list[int]]:
        """Descriptors for the output of rank 0; what is written to them goes to the head."""
        writers = []
        for number in (1, 2):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            self._outputs[reader] = number
            selector.register(reader, selectors.EVENT_READ)
            writers.append(writer)
        yield writers
        for writer in writers:
            os.close(writer)

    def is_output(self, source: object) -> bool:
        return isinstance(source, int) and source in self._outputs

    def pass_output(self, source: int, selector: selectors.BaseSelector) -> None:
        """Sends on what has arrived; what the head cannot take is dropped, since the log file has it."""
        try:
            data = os.read(source, READ_AT_ONCE)
        except BlockingIOError:
            return
        if data and self.channel.unsent < MOST_BEHIND:
            self.send("output", stream=self._outputs[source], data=base64.b64encode(data).decode())
        if not data:
            selector.unregister(source)
            os.close(source)
            del self._outputs[source]

    def drain(self, selector: selectors.BaseSelector, *, seconds: float = 2.0) -> None:
        """Sends what is left, after the ranks have ended."""
        end = time.monotonic() + seconds
        for source in list(self._outputs):
            while source in self._outputs and time.monotonic() < end:
                self.pass_output(source, selector)
        self.drain_messages(seconds=max(0.0, end - time.monotonic()))

    def drain_messages(self, *, seconds: float = 2.0) -> None:
        """Waits until the head has taken everything."""
        end = time.monotonic() + seconds
        while self.channel.unsent and not self.channel.closed and time.monotonic() < end:
            self.channel.flush()
            time.sleep(0.02)
