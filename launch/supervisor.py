"""The process over the ranks of a node: it hears of every rank over a socket, passes signals on to all of them, and ends last.

Its rules: one signal reaches every rank once, at the same moment, and never a data worker; when to ask and to kill is in
stopping.py; a rank that hangs ends the job (watch.py); nothing is left behind. On one node it is the process a person started.
On many, the head decides for all, and this process decides by itself only when the head is lost.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import psutil

from launch import stall_report
from launch.channel import Channel, listen, remove_directory_of
from launch.head_link import HeadLink
from launch.job import Job
from launch.outcome import PREEMPTED, STALLED, Ending, count, explain, overall_code, read_tail
from launch.processes import PASSED_ON, adopt_orphans, describe_status, read_signals, reap, sweep, watch_signals
from launch.stopping import PEER_SECONDS, Stopping
from launch.watch import find_hung, report_ranks

TICK = 0.25  # seconds between two looks at deadlines; everything else wakes the loop
WATCH_SECONDS = 1.0  # between two looks at the heartbeats
PAUSE_SECONDS = 5.0  # a look that comes so late: this process did not run either (a suspended machine, a frozen container)
LAUNCHER_SECONDS = 5.0  # DeepSpeed's launcher looks at its ranks once a second


@dataclass
class RankState:
    """What the supervisor knows of a rank whose keeper has reported."""

    rank: int
    keeper: int
    channel: Channel
    pid: int | None = None  # of the rank itself, once it runs


class Supervisor:
    """Runs one job to its end.

    Args:
        job: what to start.
        environment: the environment of this process.
        head: connection to the head of a launch over many nodes; None where this process decides alone.
    """

    def __init__(self, job: Job, environment: Mapping[str, str], head: HeadLink | None = None):
        self.job = job
        self.environment = environment
        self.socket_path = os.path.join(tempfile.mkdtemp(prefix="simmim-launch-", dir=_short_directory()), "socket")
        self.running: dict[int, RankState] = {}
        self.endings: list[Ending] = []
        self.begun = False  # whether any rank was let go
        self.stopping = Stopping(job.grace)
        self.requested = False  # somebody outside of the job wanted it to end
        self.stalled = False
        self.interrupts = 0
        self.watch_at = self.resumed_at = time.monotonic()
        self.head = head
        self.launcher: subprocess.Popen[bytes] | None = None
        self.selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Starts the job and waits for it.

        Returns:
            The exit code of the start: 0 finished, 2 a user's error, 75 preempted after a complete save, others a failure.
        """
        adopt_orphans()
        # A process that ignores SIGHUP was started to outlive its terminal (nohup).
        hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
        signals = watch_signals([*PASSED_ON, *hang_up, signal.SIGCHLD])
        try:
            with listen(self.socket_path) as server:
                self.selector.register(signals, selectors.EVENT_READ)
                self.selector.register(server, selectors.EVENT_READ)
                if self.head is not None:
                    self.selector.register(self.head.channel, selectors.EVENT_READ)
                self._start()
                while not self._ended():
                    self._round(server, signals)
        finally:
            sweep()
            if self.head is not None:
                self.head.drain(self.selector)
            remove_directory_of(self.socket_path)
        return self._conclude()

    def _start(self) -> None:
        self.job.log_dir.mkdir(parents=True, exist_ok=True)
        with self.job.launcher_log.open("ab") as log:
            log.write(f"===== {time.strftime('%Y-%m-%d %H:%M:%S')} {self.job.ranks} ranks\n".encode())
            log.flush()
            # A session of its own: what a terminal sends to its foreground group comes here only, and is passed on once.
            self.launcher = subprocess.Popen(
                self.job.command(self.socket_path),
                env=self.job.environment(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _ended(self) -> bool:
        """Every rank has ended and DeepSpeed's launcher too; without ranks it gets a moment to do so."""
        launcher_ended = self.launcher.poll() is not None
        if self.running:
            return False
        if len(self.endings) >= self.job.ranks and not launcher_ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(LAUNCHER_SECONDS)
            return True
        return launcher_ended and not self._keepers_may_come()

    def _keepers_may_come(self) -> bool:
        """A front that lives on without the launcher above it may still bring a keeper, which must be told to stop."""
        if len(self.endings) >= self.job.ranks:
            return False
        adopted = [child.pid for child in psutil.Process().children() if child.pid != self.launcher.pid]
        reap(adopted)
        return bool(adopted)

    def _round(self, server: socket.socket, signals: int) -> None:
        for key, _ in self.selector.select(timeout=TICK):
            if key.fileobj is server:
                self._accept(server)
            elif key.fileobj == signals:
                self._hear_signals(read_signals(signals))
            elif self.head is not None and key.fileobj is self.head.channel:
                self._obey_head()
            elif self.head is not None and self.head.is_output(key.fileobj):
                self.head.pass_output(key.fileobj, self.selector)
            else:
                self._hear(key.fileobj)
        self._look_for_launcher()
        if self.head is not None:
            self.head.tick()
            self._look_for_head()
        self._keep_deadlines()
        self._watch()

    def _look_for_launcher(self) -> None:
        """Without DeepSpeed's launcher the ranks could go on, but whoever killed it wants the run to end.

        It also ends by itself when a keeper was killed: that is a failure, which nobody asked for.
        """
        if self.launcher.poll() is None or not self.running or self.stopping.asked:
            return
        if any(ending.failed for ending in self.endings):
            self._ask(signal.SIGTERM)
        else:
            self._request(signal.SIGTERM)

    # ------------------------------------------------------------------------------------------------------- keepers

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = server.accept()
            self.selector.register(Channel(connection), selectors.EVENT_READ)

    def _hear(self, channel: Channel) -> None:
        for message in channel.receive():
            match message["event"]:
                case "hello":
                    self._welcome(channel, message)
                case "started":
                    self._note_start(channel, int(message["pid"]))
                case "signal":
                    self._request(int(message["number"]))
                case "exit":
                    self._note_ending(channel, int(message["status"]))
        if channel.closed:
            # a keeper that leaves without a word was killed, and its rank with it
            self._note_ending(channel, -signal.SIGKILL)
            self.selector.unregister(channel)
            channel.close()

    def _welcome(self, channel: Channel, message: Mapping[str, object]) -> None:
        rank = int(message["rank"])
        self.running[rank] = RankState(rank=rank, keeper=int(message["keeper"]), channel=channel)
        asked = self.stopping.asked
        reason = asked[0] if asked else signal.SIGKILL
        # Rank 0 is shown in full as it runs. Its keeper writes to these descriptors: what nobody reads holds up nobody here.
        start = not asked and not self.stopping.killed
        self.begun = self.begun or start
        if rank != 0:
            channel.send({"start": start, "signal": reason})
            return
        with self.head.outputs(self.selector) if self.head else _outputs() as outputs:
            channel.send({"start": start, "signal": reason}, descriptors=outputs)

    def _note_start(self, channel: Channel, pid: int) -> None:
        for state in self.running.values():
            if state.channel is channel:
                state.pid = pid
                if self.head is not None:
                    self.head.send("started", rank=state.rank)

    def _note_ending(self, channel: Channel, status: int) -> None:
        state = next((state for state in self.running.values() if state.channel is channel), None)
        if state is None:
            return
        del self.running[state.rank]
        ending = Ending(rank=state.rank, status=status, by_us=self.stopping.sent_by_us(status))
        self.endings.append(ending)
        self.stopping.note(ending, others=bool(self.running))
        if self.head is not None:
            self.head.send("exit", rank=ending.rank, status=status, by_us=ending.by_us)
        reap([state.keeper])

    # ------------------------------------------------------------------------------------------------------- stopping

    def _hear_signals(self, numbers: list[int]) -> None:
        for number in numbers:
            self.interrupts += number == signal.SIGINT
            if number == signal.SIGINT and self.interrupts > 1:
                self._say("launch: interrupted a second time: ending the ranks without waiting for a save.\n")
                self.stopping.kill_within(0.0)
            elif number in PASSED_ON:
                self._request(number)

    def _request(self, number: int) -> None:
        """Somebody wants the job to end: every rank of every node is asked."""
        self.requested = True
        if self.head is not None and self.head.alive:
            self.head.send("signal", number=number)
        else:
            self._ask(number)

    def _ask(self, number: int) -> None:
        """Passes a request to stop on to every rank of this node, each kind of signal once."""
        first = not self.stopping.asked
        if not self.stopping.ask(number):
            return
        if first and not any(ending.failed for ending in self.endings):
            name = signal.Signals(number).name
            self._say(
                f"launch: {name} passed on to {count(len(self.running), 'rank')}; they have {self.job.grace:g} seconds to save.\n"
            )
        for state in self.running.values():
            state.channel.send({"signal": number})

    def _keep_deadlines(self) -> None:
        if self.stopping.time_to_ask():
            self._ask(signal.SIGTERM)
        if self.stopping.time_to_kill():
            for state in self.running.values():
                state.channel.send({"kill": True})
            if not self.running:
                self.launcher.kill()

    # ----------------------------------------------------------------------------------------------------- head, watchdog

    def _obey_head(self) -> None:
        for message in self.head.hear():
            match message.get("do"):
                case "signal":
                    self._ask(int(message["number"]))
                case "kill":
                    self.stopping.kill_within(0.0)
                case "report":
                    self.head.send("report", ranks=[report.message() for report in self._reports()])
        if not self.head.alive:
            self.selector.unregister(self.head.channel)

    def _look_for_head(self) -> None:
        """Without a head the node saves what can be saved. If its network is dead, no save can be complete: then it hurries."""
        if self.head.alive or self.stopping.asked:
            return
        self._say(f"launch: the head is lost ({self.head.lost}); the ranks of {self.job.name} are stopped.\n")
        self._ask(signal.SIGTERM)
        if not self.head.channel.closed:
            self.stopping.kill_within(2 * PEER_SECONDS)

    def _reports(self) -> list:
        pids = {state.rank: state.pid for state in self.running.values() if state.pid is not None}
        return report_ranks(os.path.dirname(self.socket_path), pids, node=self.job.name)

    def _watch(self) -> None:
        """Ends the job when a rank hangs, after noting where every rank was."""
        now = time.monotonic()
        if now < self.watch_at or self.stalled or self.stopping.killed:
            return
        if now > self.watch_at + PAUSE_SECONDS:
            self.resumed_at = now
        self.watch_at = now + WATCH_SECONDS
        running = [state.rank for state in self.running.values() if state.pid is not None]
        reason = find_hung(os.path.dirname(self.socket_path), running, self.job.limits, since=self.resumed_at)
        if reason is None:
            return
        self.stalled = True
        if self.head is not None and self.head.alive:
            self.head.send("stall", reason=reason)  # it asks every node for a report, and then ends them all
            return
        text = stall_report.render(reason, self._reports(), heartbeat=self.job.limits.heartbeat)
        path = stall_report.write(self.job.log_dir, text)
        self._say(f"launch: {reason}.\n{stall_report.headline(text)}\nlaunch: the whole report: {path or text}\n")
        self.stopping.kill_within(0.0)

    # ------------------------------------------------------------------------------------------------------- the end

    def _conclude(self) -> int:
        if self.stalled:
            return STALLED
        if self.head is not None and self.head.alive and (self.begun or self.stopping.asked):
            return overall_code(self.endings)  # the head explains
        if len(self.endings) < self.job.ranks and not self.stopping.asked:
            self._say(self._launcher_failure())
            return overall_code(self.endings) or 1
        if not self.begun:
            self._say(f"launch: stopped before any rank began, so nothing is lost (exit code {PREEMPTED}). Run it again.\n")
            return PREEMPTED
        self._say(explain(self.endings, log_dir=self.job.log_dir, asked=self.stopping.asked))
        return overall_code(self.endings)

    def _launcher_failure(self) -> str:
        status = self.launcher.poll()
        ended = "was still running" if status is None else f"ended with {describe_status(status)}"
        lines = read_tail(self.job.launcher_log)[-40:]
        began = f"launch: only {len(self.endings)} of {self.job.ranks} ranks began; DeepSpeed's launcher {ended}."
        return "\n".join([began + " It said:", *(f"  | {line}" for line in lines)]) + "\n"

    def _say(self, text: str) -> None:
        """To the person who started this; on a node of many, to its log, and what is wrong to the head."""
        if self.head is None:
            _say(text)
            return
        with contextlib.suppress(OSError), self.job.launcher_log.open("a") as log:
            log.write(text)
        self.head.send("said", text=text)


@contextlib.contextmanager
def _outputs() -> Iterator[list[int]]:
    """Descriptors of stdout and stderr as this process got them; the null device for one that it was started without."""
    with open(os.devnull, "wb") as null:
        yield [number if _is_open(number) else null.fileno() for number in (1, 2)]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _say(text: str) -> None:
    """To a person, on stderr; a terminal that is gone is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _short_directory() -> str | None:
    """A Unix socket's path has at most 107 bytes; a longer temporary directory is passed over."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"
