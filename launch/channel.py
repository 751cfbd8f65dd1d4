"""Messages between the supervisor and the keepers: one JSON object a line over a Unix socket, file descriptors beside it."""

import contextlib
import json
import os
import socket
import time
from typing import Any

MOST_DESCRIPTORS = 4
RECEIVED_AT_ONCE = 65536  # bytes


class Channel:
    """One end of a connection. `closed` turns true when the other end is gone; sending to it is then quietly nothing."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._connection.setblocking(False)
        self._unread = b""
        self.closed = False
        self.descriptors: list[int] = []

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict[str, Any], *, descriptors: list[int] | None = None) -> None:
        """Messages are short and few, so a full buffer means that the other end does not live any more."""
        if self.closed:
            return
        data = json.dumps(message).encode() + b"\n"
        try:
            if descriptors:
                socket.send_fds(self._connection, [data], descriptors)
            else:
                self._connection.sendall(data)
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """The whole messages that have arrived; descriptors sent along are kept in `descriptors`."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._connection, RECEIVED_AT_ONCE, MOST_DESCRIPTORS)
        except BlockingIOError:
            return []
        except OSError:
            data, descriptors = b"", []
        self.descriptors += descriptors
        self.closed = self.closed or not data
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self._connection.close()


def listen(path: str) -> socket.socket:
    """A listening socket at `path`, in a directory that only this user may enter."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(128)
    server.setblocking(False)
    return server


def connect(path: str, *, seconds: float = 10.0) -> Channel:
    """Connects to the supervisor; while all ranks of a node arrive at once its queue may be full for a moment.

    Raises:
        OSError: nobody listens at `path` any more.
    """
    end = time.monotonic() + seconds
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except BlockingIOError:
            connection.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return Channel(connection)


def remove_directory_of(path: str) -> None:
    """Removes the socket and its directory; whoever notices last does it."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))
