"""The head of a launch over many nodes: starts a supervisor on each, decides for all ranks at once, and ends last.

    python -m launch --hostfile         head.py: signals, deadlines, the end, the exit code
      ssh | pdsh | srun                 transport.py: only starts what follows
        python -m launch.node           node.py: supervisor of the node's ranks, over a TCP connection to the head

An end of that connection that hears nothing for `silence` seconds acts alone: the head ends the other nodes, a node its ranks.
"""

import base64
import contextlib
import secrets
import selectors
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import stall_report
from launch.channel import Channel, listen_tcp
from launch.hostfile import Host
from launch.nodes import Node, Reception, Starters, check_hellos, make_nodes, missing_nodes
from launch.order import Order
from launch.outcome import FAILED, PREEMPTED, STALLED, USER_ERROR, Ending, count, explain, overall_code
from launch.output import Echo
from launch.processes import PASSED_ON, read_signals, watch_signals
from launch.stopping import Stopping
from launch.transport import Remote, own_address, resolve
from launch.versions import identify
from launch.watch import Limits, RankReport

TICK = 0.25  # seconds between two looks at deadlines; everything else wakes the loop
REPORT_SECONDS = 8.0  # until every node has said where its ranks are
START_ENDED_SECONDS = 2.0  # ssh has ended and its node has not come: how long it may still be on its way


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """One start over many nodes.

    Args:
        hosts: nodes and slots; the first one gets rank 0.
        remote: how to reach them.
        launcher: who starts the ranks on a node: deepspeed or torchrun.
        program, log_dir, grace: as in `Job`.
        master_addr, master_port: where the ranks meet; None: the first node, a free port.
        control_address, control_port: where the nodes find the head; None: this machine's address towards them; 0: a free port.
        connect_seconds: until all nodes must be there.
        silence: seconds without a word until the other end counts as lost.
        limits: when a rank counts as hung.
        environment: variables for the ranks on all nodes.
        allow_mismatch: go on although a node has other code or packages.
    """

    hosts: tuple[Host, ...]
    remote: Remote
    launcher: str
    program: tuple[str, ...]
    log_dir: Path
    grace: float
    master_addr: str | None
    master_port: int | None
    control_address: str | None
    control_port: int
    connect_seconds: float
    silence: float
    limits: Limits
    environment: Mapping[str, str]
    allow_mismatch: bool

    @property
    def ranks(self) -> int:
        return sum(len(host.slots) for host in self.hosts)

    def order(self, *, secret: str, addresses: Iterable[str], port: int) -> Order:
        return Order(
            secret=secret,
            addresses=tuple(addresses),
            port=port,
            world={host.short: tuple(map(str, host.slots)) for host in self.hosts},
            program=self.program,
            log_dir=str(self.log_dir),
            grace=self.grace,
            launcher=self.launcher,
            silence=self.silence,
            heartbeat=self.limits.heartbeat,
            stall=self.limits.stall,
            start=self.limits.start,
            environment=dict(self.environment),
        )


class Head:
    """Runs one start of a cluster job to its end."""

    def __init__(self, job: ClusterJob, environment: Mapping[str, str]):
        self.job = job
        self.environment = environment
        self.nodes = make_nodes(job.hosts, [resolve(host, job.remote) for host in job.hosts])
        self.stopping = Stopping(job.grace)
        self.endings: list[Ending] = []
        self.begun = False
        self.requested = False  # a person or a scheduler wanted it to end
        self.interrupts = 0
        self.stall: str | None = None  # what the watchdog of a node, or the head itself, noticed
        self.reports: list[RankReport] | None = None
        self.awaited: set[Node] = set()  # nodes that have not yet reported
        self.report_until = 0.0
        self.beat_at = 0.0
        self.echoes = (Echo(1), Echo(2))
        self.selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Returns:
        The exit code, see `outcome.py`.

        Raises:
            ValueError: an address or port that cannot work, or nodes that do not fit together.
        """
        master = self._master_address()
        hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
        signals = watch_signals([*PASSED_ON, *hang_up])
        secret = secrets.token_hex(32)
        try:
            server = listen_tcp(self.job.control_port)
        except OSError as error:
            raise ValueError(f"--control-port: {self.job.control_port} cannot be used ({error.strerror}).") from error
        with server:
            addresses = [self.job.control_address or own_address(node.address) for node in self.nodes]
            order = self.job.order(secret=secret, addresses=addresses, port=server.getsockname()[1])
            self.reception = Reception(server, self.nodes, secret, self.selector)
            self.selector.register(signals, selectors.EVENT_READ)
            self.starters = Starters(
                self.nodes,
                self.job.remote,
                module="launch.node",
                order=order.encode(),
                folder=self.job.log_dir,
                environment=self.environment,
            )
            try:
                return self._gather_and_run(signals, master)
            finally:
                for node in self.nodes:
                    node.close()
                self.starters.end()
                self.selector.close()

    def _gather_and_run(self, signals: int, master: str) -> int:
        if not self._gather(signals):
            return self._not_gathered()
        self.starters.remove_order()
        on_gpu = check_hellos(self.nodes, identify(), log_dir=str(self.job.log_dir), allow_mismatch=self.job.allow_mismatch)
        port = self.job.master_port or self.nodes[0].hello["port"]
        for node in self.nodes:
            node.send("begin", master_addr=master, master_port=port, on_gpu=on_gpu)
        where = "GPUs" if on_gpu else "CPUs"
        nodes = count(len(self.nodes), "node")
        _say(f"launch: {nodes} ready; {count(self.job.ranks, 'rank')} on {where}, meeting at {master} port {port}\n")
        while not self._ended():
            self._round(signals)
        for echo in self.echoes:
            echo.flush(seconds=1.0)
        return self._conclude()

    def _master_address(self) -> str:
        address = self.job.master_addr or self.nodes[0].address
        if len(self.nodes) > 1 and address.startswith(("127.", "::1", "localhost")):
            raise ValueError(
                f"--master-addr: {self.nodes[0].name} is {address} here, where other nodes cannot reach it."
                " Name the address that they reach it at."
            )
        return address

    # -------------------------------------------------------------------------------------------------------- gathering

    def _gather(self, signals: int) -> bool:
        """Waits until every node is there. False: a stop was asked for, or some node does not come."""
        end = time.monotonic() + self.job.connect_seconds
        dead_since: float | None = None
        while not all(node.present for node in self.nodes):
            self._round(signals)
            now = time.monotonic()
            dead = [node for node in self.nodes if node.channel is None and node.start_code is not None]
            dead_since = (dead_since or now) if dead else None
            gone = any(node.lost for node in self.nodes)
            if self.stopping.asked or gone or now > end or (dead_since and now - dead_since > START_ENDED_SECONDS):
                return False
        return True

    def _not_gathered(self) -> int:
        if self.stopping.asked:
            _say(f"launch: stopped before any rank began, so nothing is lost (exit code {PREEMPTED}). Run it again.\n")
            return PREEMPTED
        missing = [node for node in self.nodes if node.channel is None]
        seconds = f"after {self.job.connect_seconds:g} seconds " if not any(node.start_code for node in missing) else ""
        _say(f"launch: {seconds}{len(missing)} of {count(len(self.nodes), 'node')} did not come:\n{missing_nodes(self.nodes)}\n")
        _say("launch: `python -m launch check` looks at all of them at once.\n")
        return FAILED

    # ---------------------------------------------------------------------------------------------------------- running

    def _ended(self) -> bool:
        return all(node.goodbye is not None or node.lost is not None for node in self.nodes) and not self.report_until

    def _round(self, signals: int) -> None:
        for key, _ in self.selector.select(timeout=TICK):
            if key.fileobj is self.reception.server:
                self.reception.accept()
            elif key.fileobj == signals:
                self._hear_signals(read_signals(signals))
            elif self.reception.is_stranger(key.fileobj):
                self.reception.hear(key.fileobj)
            else:
                self._hear(key.fileobj)
        self.starters.tick()
        self._tick_nodes()
        self._keep_deadlines()
        for echo in self.echoes:
            echo.flush(seconds=0.0)

    def _hear(self, channel: Channel) -> None:
        node = next(node for node in self.nodes if node.channel is channel)
        for message in channel.receive():
            self._take(node, message)
        if channel.closed:
            self.selector.unregister(channel)
            if node.goodbye is None and node.lost is None:
                self._lose(node, "its supervisor ended without a word")
                # its ranks are asked to save by their keepers; the others must take part
                self._ask(signal.SIGTERM)

    def _take(self, node: Node, message: Mapping[str, Any]) -> None:
        match message.get("event"):
            case "started":
                self.begun = True
            case "exit":
                self._note_ending(int(message["rank"]), int(message["status"]), by_us=bool(message["by_us"]))
            case "signal":
                self.requested = True
                self._ask(int(message["number"]))
            case "output":
                self.echoes[int(message["stream"]) - 1].write(base64.b64decode(message["data"]))
            case "said":
                _say(f"{node.name}: {message['text']}")
            case "stall":
                self._begin_report(f"{node.name}: {message['reason']}")
            case "report":
                self.awaited.discard(node)
                self.reports = (self.reports or []) + [RankReport(**one) for one in message["ranks"]]
            case "goodbye":
                node.goodbye = int(message["code"])
                self.awaited.discard(node)

    def _note_ending(self, rank: int, status: int, *, by_us: bool) -> None:
        ending = Ending(rank=rank, status=status, by_us=by_us or self.stopping.sent_by_us(status))
        self.endings.append(ending)
        self.stopping.note(ending, others=len(self.endings) < self.job.ranks)

    def _tick_nodes(self) -> None:
        now = time.monotonic()
        beat = now > self.beat_at
        self.beat_at = now + self.job.silence / 4 if beat else self.beat_at
        for node in self.nodes:
            if not node.present or node.goodbye is not None:
                continue
            if beat:
                node.send("beat")
            node.channel.flush()
            if now - node.channel.heard_at > self.job.silence:
                self._lose(node, f"it has said nothing for {self.job.silence:g} seconds: its network or the machine is down")
                self._begin_report(f"node {node.name} is lost")

    def _lose(self, node: Node, why: str) -> None:
        node.lost = why
        _say(f"launch: lost node {node.name} ({node.address}), ranks {node.ranks[0]} to {node.ranks[-1]}: {why}.\n")
        ended = {ending.rank for ending in self.endings}
        for rank in node.ranks:
            if rank not in ended:
                self.endings.append(Ending(rank=rank, status=STALLED))

    # --------------------------------------------------------------------------------------------------------- stopping

    def _hear_signals(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.interrupts += number == signal.SIGINT
            if number == signal.SIGINT and self.interrupts > 1:
                _say("launch: interrupted a second time: ending the ranks without waiting for a save.\n")
                self.stopping.kill_within(0.0)
            elif number in PASSED_ON:
                self.requested = True
                self._ask(number)

    def _ask(self, number: int) -> None:
        first = not self.stopping.asked
        if not self.stopping.ask(number):
            return
        if first and self.begun and not any(ending.failed for ending in self.endings):
            left = self.job.ranks - len(self.endings)
            name = signal.Signals(number).name
            _say(f"launch: {name} passed on to {count(left, 'rank')}; they have {self.job.grace:g} seconds to save.\n")
        for node in self.nodes:
            node.send("signal", number=number)

    def _keep_deadlines(self) -> None:
        if self.reports is not None and self.report_until and (not self.awaited or time.monotonic() > self.report_until):
            self._finish_report()
        if self.stopping.time_to_ask():
            self._ask(signal.SIGTERM)
        if self.stopping.time_to_kill():
            for node in self.nodes:
                node.send("kill")

    # ----------------------------------------------------------------------------------------------------------- stalls

    def _begin_report(self, reason: str) -> None:
        """A rank or a node hangs: every node is asked where its ranks are, and then they are ended, since no save can be."""
        if self.stall is not None:
            return
        self.stall, self.reports = reason, []
        self.awaited = {node for node in self.nodes if node.present and node.goodbye is None}
        self.report_until = time.monotonic() + REPORT_SECONDS
        for node in self.awaited:
            node.send("report")

    def _finish_report(self) -> None:
        self.report_until = 0.0
        missing = [f"node {node.name} ({node.address}): {node.lost}" for node in self.nodes if node.lost]
        missing += [f"node {node.name} ({node.address}): it did not answer" for node in self.awaited]
        text = stall_report.render(self.stall or "", self.reports or [], heartbeat=self.job.limits.heartbeat, missing=missing)
        path = stall_report.write(self.job.log_dir, text)
        _say(f"launch: {self.stall}.\n{stall_report.headline(text)}\nlaunch: the whole report: {path or text}\n")
        self.stopping.kill_within(0.0)

    # ---------------------------------------------------------------------------------------------------------- the end

    def _conclude(self) -> int:
        lost = [node.name for node in self.nodes if node.lost]
        own = [ending for ending in self.endings if ending.failed and not ending.by_us and ending.status != STALLED]
        if (self.stall or lost) and not own:
            saved = any(ending.status == PREEMPTED for ending in self.endings)
            end = "a complete save was made on the way out" if saved else "the next start goes on from the last complete save"
            _say(f"launch: ended since {self.stall or 'node ' + ', '.join(lost) + ' was lost'} (exit code {STALLED}); {end}.\n")
            return STALLED
        if len(self.endings) < self.job.ranks and not self.stopping.asked:
            began = f"launch: only {len(self.endings)} of {self.job.ranks} ranks began."
            _say(f"{began} What the launcher of each node says is in {self.job.log_dir}/launcher_NODE.log\n")
            return overall_code(self.endings) or FAILED
        if not self.begun:
            return self._not_gathered()
        with contextlib.suppress(OSError):
            _say(explain(self.endings, log_dir=self.job.log_dir, asked=self.stopping.asked))
        return overall_code(self.endings)


def start_cluster(job: ClusterJob, environment: Mapping[str, str]) -> tuple[int, bool]:
    """One start; the exit code, and whether somebody asked for its end."""
    try:
        head = Head(job, environment)
        return head.run(), head.requested
    except ValueError as error:
        _say(f"error: {error}\n")
        return USER_ERROR, False


def _say(text: str) -> None:
    """To a person, on stderr; a terminal that is gone is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
