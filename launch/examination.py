"""Asks nodes questions and collects their answers: what `python -m launch check` runs on."""

import secrets
import selectors
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from launch.channel import listen_tcp
from launch.hostfile import Host
from launch.nodes import Node, Reception, Starters, make_nodes
from launch.order import Order
from launch.transport import Remote, own_address, resolve
from launch.watch import Limits

SILENCE = 600.0  # seconds: a node that imports torch or measures says nothing meanwhile
ENDED_SECONDS = 2.0


class Examination:
    """A connection to every node that can be reached.

    Args:
        hosts, remote: which nodes, and how to reach them.
        environment: of this process; forwarded: the variables that go to the nodes.
        control_address, control_port: where nodes find this process; None and 0 choose.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        remote: Remote,
        *,
        environment: Mapping[str, str],
        forwarded: Mapping[str, str],
        control_address: str | None,
        control_port: int,
    ):
        self.nodes = make_nodes(hosts, [resolve(host, remote) for host in hosts])
        self.selector = selectors.DefaultSelector()
        self._folder = tempfile.TemporaryDirectory(prefix="simmim-check-")
        self._answers: dict[tuple[int, str], dict[str, Any]] = {}
        self._arrived: dict[tuple[int, str], float] = {}
        secret = secrets.token_hex(32)
        try:
            self.server = listen_tcp(control_port)
        except OSError as error:
            raise ValueError(f"--control-port: {control_port} cannot be used ({error.strerror}).") from error
        limits = Limits()
        order = Order(
            secret=secret,
            addresses=tuple(control_address or own_address(node.address) for node in self.nodes),
            port=self.server.getsockname()[1],
            world={host.short: tuple(map(str, host.slots)) for host in hosts},
            program=(),
            log_dir=self._folder.name,
            grace=1.0,
            launcher="deepspeed",
            silence=SILENCE,
            heartbeat=limits.heartbeat,
            stall=limits.stall,
            start=limits.start,
            environment=dict(forwarded),
        )
        self.reception = Reception(self.server, self.nodes, secret, self.selector)
        self.starters = Starters(
            self.nodes,
            remote,
            module="launch.probe",
            order=order.encode(),
            folder=Path(self._folder.name),
            environment=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.close()
        self.starters.end()
        self.server.close()
        self._folder.cleanup()

    @property
    def present(self) -> list[Node]:
        return [node for node in self.nodes if node.present]

    def gather(self, seconds: float) -> None:
        """Waits until every node is there, or it is clear that it does not come."""
        end, dead_at = time.monotonic() + seconds, {}
        while time.monotonic() < end:
            waiting = []
            for node in self.nodes:
                if node.start_code is not None:
                    dead_at.setdefault(node.index, time.monotonic())
                gone = node.index in dead_at and time.monotonic() - dead_at[node.index] > ENDED_SECONDS
                if not node.present and not gone:
                    waiting.append(node)
            if not waiting:
                break
            self._round()
        for node in self.present:
            node.send("begin")

    def ask(self, name: str, nodes: Sequence[Node], *, seconds: float, **arguments: Any) -> dict[Node, dict[str, Any]]:
        """The same question to several nodes at once."""
        return self.ask_each(name, {node: arguments for node in nodes}, seconds=seconds)

    def ask_each(self, name: str, questions: Mapping[Node, Mapping[str, Any]], *, seconds: float) -> dict[Node, dict[str, Any]]:
        """A question to each node with arguments of its own; who does not answer in time has an `error`."""
        for node, arguments in questions.items():
            self._answers.pop((node.index, name), None)
            node.send("task", name=name, arguments=dict(arguments))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if all((node.index, name) in self._answers or not node.present for node in questions):
                break
            self._round()
        silent = {"error": f"no answer within {seconds:g} seconds"}
        gone = {"error": "the connection to the node was lost"}
        return {node: self._answers.get((node.index, name), silent if node.present else gone) for node in questions}

    def arrived(self, node: Node, name: str) -> float:
        """When the last answer of a node came, on this machine's clock (`time.time`)."""
        return self._arrived.get((node.index, name), time.time())

    def _round(self) -> None:
        for key, _ in self.selector.select(timeout=0.1):
            if key.fileobj is self.server:
                self.reception.accept()
            elif self.reception.is_stranger(key.fileobj):
                self.reception.hear(key.fileobj)
            else:
                self._hear(key.fileobj)
        self.starters.tick()
        for node in self.present:
            node.channel.flush()

    def _hear(self, channel: Any) -> None:
        node = next(node for node in self.nodes if node.channel is channel)
        for message in channel.receive():
            if message.get("event") == "result":
                self._answers[(node.index, message["name"])] = message["value"]
                self._arrived[(node.index, message["name"])] = time.time()
        if channel.closed:
            self.selector.unregister(channel)
            node.lost = "its connection closed"
