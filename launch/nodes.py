"""The nodes of a launch as the head sees them, from the start of their processes until every one of them has said hello."""

import contextlib
import os
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.channel import Channel
from launch.hostfile import Host
from launch.node import answer
from launch.outcome import count
from launch.transport import Remote, advise
from launch.versions import differences

LAST_WORDS = 12  # lines of a node's complaints that are shown
STARTER_SECONDS = 3.0  # ssh ends a moment after the process that it started


@dataclass(eq=False)
class Node:
    """One node: its place, and what is known of it."""

    index: int
    host: Host
    address: str
    first_rank: int
    channel: Channel | None = None
    hello: Mapping[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # by ssh or the remote shell
    start_code: int | None = None  # of the command that started it, once that has ended
    goodbye: int | None = None
    lost: str | None = None

    @property
    def name(self) -> str:
        return self.host.short

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + len(self.host.slots))

    @property
    def present(self) -> bool:
        return self.channel is not None and not self.channel.closed and self.lost is None

    def send(self, do: str, **values: Any) -> None:
        if self.channel is not None:
            self.channel.send({"do": do, **values})

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()


def make_nodes(hosts: Sequence[Host], addresses: Sequence[str]) -> list[Node]:
    nodes, first = [], 0
    for index, (host, address) in enumerate(zip(hosts, addresses, strict=True)):
        nodes.append(Node(index=index, host=host, address=address, first_rank=first))
        first += len(host.slots)
    return nodes


class Starters:
    """The ssh, pdsh or srun processes. They carry the order and complaints; the run itself does not depend on them."""

    def __init__(
        self,
        nodes: Sequence[Node],
        remote: Remote,
        *,
        module: str,
        order: bytes,
        folder: Path,
        environment: Mapping[str, str],
    ):
        self.nodes = nodes
        self.order_file = None if remote.takes_input else _write_secretly(folder, order)
        self.kind = remote.kind
        self.processes: list[tuple[subprocess.Popen[bytes], list[int]]] = []
        for command, indices in remote.commands([node.host for node in nodes], module, str(self.order_file or "-")):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=remote.environment(environment),
                start_new_session=True,  # a key pressed in a terminal is for the head, which passes it on
            )
            os.set_blocking(process.stdout.fileno(), False)
            with contextlib.suppress(OSError):
                if self.order_file is None:
                    process.stdin.write(order)
                process.stdin.close()
            self.processes.append((process, indices))

    def tick(self) -> None:
        """Reads what they say and notes which have ended."""
        for process, indices in self.processes:
            with contextlib.suppress(OSError):
                while data := os.read(process.stdout.fileno(), 65536):
                    self._note(data.decode(errors="replace"), indices)
            code = process.poll()
            if code is not None and len(indices) == 1:
                self.nodes[indices[0]].start_code = code
            elif code is not None and not any(self.nodes[index].channel for index in indices):
                for index in indices:
                    self.nodes[index].start_code = code

    def _note(self, text: str, indices: list[int]) -> None:
        for line in text.splitlines():
            if len(indices) == 1:
                self.nodes[indices[0]].said.append(line)
                continue
            # pdsh writes `HOST: text`, and `pdsh@HERE: HOST: ssh exited with exit code 255`
            for index in indices:
                name = self.nodes[index].host.short
                prefix, _, rest = line.partition(": ")
                if prefix == name:
                    self.nodes[index].said.append(rest)
                elif f": {name}: " in line:
                    self.nodes[index].said.append(line)
                    if "exited with exit code" in line and self.nodes[index].channel is None:
                        self.nodes[index].start_code = 255

    def remove_order(self) -> None:
        """Every node has read it, or will not come: it holds a secret and perhaps passwords."""
        if self.order_file is not None:
            self.order_file.unlink(missing_ok=True)

    def end(self) -> None:
        """Waits a moment for them, then kills them: what they started is ended by other means."""
        self.remove_order()
        end = time.monotonic() + STARTER_SECONDS
        for process, _ in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self.tick()
        for process, _ in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()


def _write_secretly(folder: Path, order: bytes) -> Path:
    """The order in a new file that only this user can read."""
    descriptor, name = tempfile.mkstemp(prefix=".order-", dir=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.write(order)
        os.fsync(file.fileno())
    return Path(name)


class Reception:
    """Takes connections and lets in who knows the secret."""

    def __init__(self, server: socket.socket, nodes: Sequence[Node], secret: str, selector: selectors.BaseSelector):
        self.server = server
        self.nodes = nodes
        self.secret = secret
        self.selector = selector
        self._strangers: dict[Channel, str] = {}
        selector.register(server, selectors.EVENT_READ)

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self.server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel = Channel(connection)
            nonce = secrets.token_hex(16)
            channel.send({"do": "nonce", "nonce": nonce})
            self._strangers[channel] = nonce
            self.selector.register(channel, selectors.EVENT_READ)

    def is_stranger(self, channel: object) -> bool:
        return channel in self._strangers

    def hear(self, channel: Channel) -> None:
        """The first words of a connection: a node's hello, or its end."""
        messages = _messages(channel)
        hello = next((message for message in messages if message.get("event") == "hello"), None)
        if hello is not None and answer(self.secret, self._strangers[channel]) == hello.get("proof"):
            node = self.nodes[int(hello["node"])]
            node.channel, node.hello = channel, hello
            del self._strangers[channel]
        elif hello is not None or channel.closed:
            del self._strangers[channel]
            self.selector.unregister(channel)
            channel.close()


def _messages(channel: Channel) -> list[dict[str, Any]]:
    try:
        return [message for message in channel.receive() if isinstance(message, dict)]
    except ValueError:  # somebody who speaks no JSON
        channel.closed = True
        return []


def missing_nodes(nodes: Sequence[Node]) -> str:
    """Who did not come, why as far as ssh tells, and what to do."""
    parts = []
    for node in nodes:
        if node.channel is not None:
            continue
        said = [line for line in node.said if line.strip()][-LAST_WORDS:]
        ended = f"ended with exit code {node.start_code}" if node.start_code is not None else "has not answered"
        shown = "".join(f"\n    | {line}" for line in said)
        parts.append(f"  {node.name}: the start on it {ended}. {advise(' '.join(said), node.host)}{shown}")
    return "\n".join(parts)


def check_hellos(nodes: Sequence[Node], here: Mapping[str, str], *, log_dir: str, allow_mismatch: bool) -> bool:
    """Whether the nodes that came can run the job together; True if it runs on GPUs.

    Raises:
        ValueError: other code or packages, too few GPUs, GPUs on some nodes only, or a run directory that is not shared.
    """
    problems = []
    for node in nodes:
        differ = differences(here, node.hello["versions"])
        if differ and not allow_mismatch:
            problems.append(
                f"  {node.name}: {'; '.join(differ)}. Bring it to the same state (git pull, make setup),"
                " or start with --allow-mismatch."
            )
        elif differ:
            sys.stderr.write(f"launch: warning: {node.name} has {'; '.join(differ)}\n")
        devices = node.hello["devices"]
        if devices and len(devices) <= max(node.host.slots):
            problems.append(
                f"  {node.name}: slot {max(node.host.slots)} was asked for, but it has {count(len(devices), 'GPU')}."
                f" Write slots={len(devices)}, or DS_ACCELERATOR=cpu to run on the CPU."
            )
        if not node.hello["log_dir"]:
            problems.append(
                f"  {node.name}: does not see {log_dir}. The run directory must be on a file system that all nodes share."
            )
    on_gpu = [bool(node.hello["devices"]) for node in nodes]
    if any(on_gpu) and not all(on_gpu):
        without = ", ".join(node.name for node, found in zip(nodes, on_gpu, strict=True) if not found)
        problems.append(f"  {without}: no GPU, while other nodes have some. Leave it out with --exclude, or repair its driver.")
    if problems:
        raise ValueError("the nodes do not fit together:\n" + "\n".join(problems))
    return all(on_gpu)
