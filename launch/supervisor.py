"""The process a person started: it hears of every rank over a socket, passes signals on to all of them, and ends last.

Its rules: one signal reaches every rank once, at the same moment, and never a data worker; ranks get `grace` seconds to save;
when a rank fails the others get a moment to fail by themselves, since their messages may name the cause; nothing is left behind.
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

from launch.channel import Channel, listen, remove_directory_of
from launch.job import LAUNCHER_LOG, Job
from launch.outcome import PREEMPTED, Ending, explain, overall_code, read_tail
from launch.processes import PASSED_ON, adopt_orphans, describe_status, read_signals, reap, sweep, watch_signals

TICK = 0.25  # seconds between two looks at deadlines; everything else wakes the loop
PEER_SECONDS = 15.0  # after a failure: until the other ranks are asked to stop, and again until they are killed
LAUNCHER_SECONDS = 5.0  # DeepSpeed's launcher looks at its ranks once a second


@dataclass
class RankState:
    """What the supervisor knows of a rank whose keeper has reported."""

    rank: int
    keeper: int
    channel: Channel


class Supervisor:
    """Runs one job to its end.

    Args:
        job: what to start.
        environment: the environment of this process.
    """

    def __init__(self, job: Job, environment: Mapping[str, str]):
        self.job = job
        self.environment = environment
        self.socket_path = os.path.join(tempfile.mkdtemp(prefix="simmim-launch-", dir=_short_directory()), "socket")
        self.running: dict[int, RankState] = {}
        self.endings: list[Ending] = []
        self.begun = False  # whether any rank was let go
        self.asked: list[int] = []  # signals that were passed on, in order
        self.interrupts = 0
        self.ask_at: float | None = None
        self.kill_at: float | None = None
        self.killed = False
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
                self._start()
                while not self._ended():
                    self._round(server, signals)
        finally:
            sweep()
            remove_directory_of(self.socket_path)
        return self._conclude()

    def _start(self) -> None:
        self.job.log_dir.mkdir(parents=True, exist_ok=True)
        with (self.job.log_dir / LAUNCHER_LOG).open("ab") as log:
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
            else:
                self._hear(key.fileobj)
        if self.launcher.poll() is not None and self.running:
            # DeepSpeed's launcher was killed: the ranks could go on without it, but whoever killed it wants the run to end.
            self._ask(signal.SIGTERM)
        self._keep_deadlines()

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
                case "signal":
                    self._ask(int(message["number"]))
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
        reason = self.asked[0] if self.asked else signal.SIGKILL
        # Rank 0 is shown in full as it runs. Its keeper writes to these descriptors: what nobody reads holds up nobody here.
        start = not self.asked and not self.killed
        self.begun = self.begun or start
        with _outputs() as outputs:
            shown = outputs if rank == 0 else []
            channel.send({"start": start, "signal": reason}, descriptors=shown)

    def _note_ending(self, channel: Channel, status: int) -> None:
        state = next((state for state in self.running.values() if state.channel is channel), None)
        if state is None:
            return
        del self.running[state.rank]
        by_us = -status in self.asked or (self.killed and status == -signal.SIGKILL)
        ending = Ending(rank=state.rank, status=status, by_us=by_us)
        self.endings.append(ending)
        now = time.monotonic()
        if ending.failed and self.running:
            self.ask_at = min(self.ask_at or now + PEER_SECONDS, now + PEER_SECONDS)
            self.kill_at = min(self.kill_at or now + 2 * PEER_SECONDS, now + 2 * PEER_SECONDS)
        elif status == PREEMPTED:
            self.kill_at = self.kill_at or now + self.job.grace
        reap([state.keeper])

    # ------------------------------------------------------------------------------------------------------- stopping

    def _hear_signals(self, numbers: list[int]) -> None:
        for number in numbers:
            self.interrupts += number == signal.SIGINT
            if number == signal.SIGINT and self.interrupts > 1:
                _say("launch: interrupted a second time: ending the ranks without waiting for a save.\n")
                self.kill_at = time.monotonic()
            elif number in PASSED_ON:
                self._ask(number)

    def _ask(self, number: int) -> None:
        """Passes a request to stop on to every rank, each kind of signal once."""
        if number in self.asked:
            return
        if not self.asked and not any(ending.failed for ending in self.endings):
            name = signal.Signals(number).name
            _say(f"launch: {name} passed on to {len(self.running)} ranks; they have {self.job.grace:g} seconds to save.\n")
        self.asked.append(number)
        deadline = time.monotonic() + self.job.grace
        self.kill_at = min(self.kill_at or deadline, deadline)
        for state in self.running.values():
            state.channel.send({"signal": number})

    def _keep_deadlines(self) -> None:
        now = time.monotonic()
        if self.ask_at is not None and now > self.ask_at:
            self.ask_at = None
            self._ask(signal.SIGTERM)
        if self.kill_at is not None and now > self.kill_at and not self.killed:
            self.killed = True
            for state in self.running.values():
                state.channel.send({"kill": True})
            if not self.running:
                self.launcher.kill()

    # ------------------------------------------------------------------------------------------------------- the end

    def _conclude(self) -> int:
        if len(self.endings) < self.job.ranks and not self.asked:
            _say(self._launcher_failure())
            return overall_code(self.endings) or 1
        if not self.begun:
            _say(f"launch: stopped before any rank began, so nothing is lost (exit code {PREEMPTED}). Run it again.\n")
            return PREEMPTED
        _say(explain(self.endings, log_dir=self.job.log_dir, asked=self.asked))
        return overall_code(self.endings)

    def _launcher_failure(self) -> str:
        status = self.launcher.poll()
        ended = "was still running" if status is None else f"ended with {describe_status(status)}"
        lines = read_tail(self.job.log_dir / LAUNCHER_LOG)[-40:]
        began = f"launch: only {len(self.endings)} of {self.job.ranks} ranks began; DeepSpeed's launcher {ended}."
        return "\n".join([began + " It said:", *(f"  | {line}" for line in lines)]) + "\n"


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
