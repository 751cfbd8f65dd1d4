"""Messages between processes of the launcher: one JSON object a line over a Unix or TCP socket, file descriptors beside it."""

import contextlib
import json
import os
import socket
import time
from typing import Any

MOST_DESCRIPTORS = 4
RECEIVED_AT_ONCE = 65536  # bytes
MOST_UNSENT = 8 << 20  # bytes that may wait for an end that does not read; more means that it does not live any more


class Channel:
    """One end of a connection. `closed` turns true when the other end is gone; sending to it is then quietly nothing."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._connection.setblocking(False)
        self._unread = b""
        self._unsent = bytearray()
        self.closed = False
        self.heard_at = time.monotonic()  # when something last arrived
        self.descriptors: list[int] = []

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def unsent(self) -> int:
        """Bytes that the other end has not taken yet."""
        return len(self._unsent)

    def send(self, message: dict[str, Any], *, descriptors: list[int] | None = None) -> None:
        """Sends what the other end takes at once and keeps the rest for `flush`; descriptors go with a first message."""
        if self.closed:
            return
        data = json.dumps(message).encode() + b"\n"
        if not descriptors:
            self._unsent += data
            self.flush()
            return
        try:
            socket.send_fds(self._connection, [data], descriptors)
        except OSError:
            self.closed = True

    def flush(self) -> None:
        """Tries again to send what is left; called regularly by whoever sends much."""
        try:
            while self._unsent and not self.closed:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            self.closed = len(self._unsent) > MOST_UNSENT
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
        self.heard_at = time.monotonic()
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


def listen_tcp(port: int) -> socket.socket:
    """A listening TCP socket on every address of this machine; port 0 takes a free one.

    Raises:
        OSError: the port is taken or may not be used.
    """
    try:
        server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    except OSError:  # no IPv6 on this machine, or the port is taken: which of them, the second attempt tells
        server = socket.create_server(("", port), backlog=1024)
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


def connect_tcp(address: str, port: int, *, seconds: float) -> Channel:
    """Connects to the head of a launch.

    Raises:
        OSError: it cannot be reached.
    """
    connection = socket.create_connection((address, port), timeout=seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(connection)


def remove_directory_of(path: str) -> None:
    """Removes the socket and its directory with what else the launcher put there; whoever notices last does it."""
    directory = os.path.dirname(path)
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
    with contextlib.suppress(OSError):
        os.rmdir(directory)
