"""The keeper of a rank: starts it, keeps its output, passes signals on, and stops it when whoever decides is gone.

Messages to the supervisor: hello, started, signal, exit; from it: welcome, signal, kill.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time

from launch.channel import connect, remove_directory_of
from launch.front import DONE
from launch.output import RankOutput
from launch.processes import PASSED_ON, adopt_orphans, die_with_this, read_signals, sweep, watch_signals
from launch.settings import RankSettings
from launch.watch import VARIABLE, beat_path

TICK = 0.1  # seconds between two looks at deadlines; everything else wakes the loop
WELCOME_SECONDS = 60.0


class Keeper:
    """Runs one rank to its end.

    Args:
        settings: what to run and where its output goes.
        front: connection to the front; it closes when DeepSpeed's launcher has killed the front.
    """

    def __init__(self, settings: RankSettings, front: socket.socket):
        self.settings = settings
        self.front = front
        self.rank = int(os.environ["RANK"])
        self.signals = watch_signals((*PASSED_ON, signal.SIGHUP, signal.SIGCHLD))
        self.supervisor = connect(settings.socket)
        self.kill_at: float | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        adopt_orphans()
        self.supervisor.send({"event": "hello", "rank": self.rank, "keeper": os.getpid()})
        welcome = self._await_welcome()
        if welcome is None or not welcome["start"]:
            # the run was stopped before this rank began
            self._report(-int((welcome or {}).get("signal", signal.SIGTERM)))
            return
        with RankOutput(self.settings.log_dir, self.rank, echo=self.supervisor.descriptors) as output:
            self._start(output)
            status = self._loop(output)
            sweep()
            output.drain()
        self._report(status)

    def _await_welcome(self) -> dict[str, object] | None:
        end = time.monotonic() + WELCOME_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.supervisor, selectors.EVENT_READ)
            while time.monotonic() < end and not self.supervisor.closed:
                if selector.select(timeout=1.0):
                    for message in self.supervisor.receive():
                        return message
        return None

    def _start(self, output: RankOutput) -> None:
        command = [sys.executable, "-u", *self.settings.program]
        where = f" on {self.settings.node}" if self.settings.node else ""
        output.note(f"rank {self.rank} of {os.environ['WORLD_SIZE']}{where}: {' '.join(command)}")
        # A session of its own, so that a key pressed in a terminal reaches the supervisor alone, which passes it on once.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output.stdout,
            stderr=output.stderr,
            env={**os.environ, "PYTHONUNBUFFERED": "1", VARIABLE: beat_path(os.path.dirname(self.settings.socket), self.rank)},
            start_new_session=True,
            preexec_fn=die_with_this(signal.SIGKILL),
        )
        output.started()
        self.supervisor.send({"event": "started", "pid": self.process.pid})

    def _loop(self, output: RankOutput) -> int:
        with selectors.DefaultSelector() as selector:
            for source in (self.supervisor, self.front, self.signals, *output.sources):
                selector.register(source, selectors.EVENT_READ)
            while (status := self.process.poll()) is None:
                ready = {key.fileobj for key, _ in selector.select(timeout=TICK)}
                self._hear(ready, selector)
                for source in ready & set(output.sources):
                    if not output.read(source):
                        selector.unregister(source)
                output.tick()
                if self.kill_at is not None and time.monotonic() > self.kill_at:
                    self._kill()
        return status

    def _hear(self, ready: set, selector: selectors.BaseSelector) -> None:
        if self.supervisor in ready:
            for message in self.supervisor.receive():
                self._obey(message)
        if self.supervisor.closed and self.supervisor in selector.get_map():
            selector.unregister(self.supervisor)
            self._stop_alone()
        if self.front in ready:
            self._hear_front(selector)
        if self.signals in ready:
            for number in read_signals(self.signals):
                self._pass_on(number)

    def _hear_front(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            if numbers := self.front.recv(64):
                for number in numbers:
                    self._pass_on(number)
                return
        selector.unregister(self.front)
        self._pass_on(signal.SIGTERM)

    def _obey(self, message: dict[str, object]) -> None:
        if "kill" in message:
            self._kill()
        elif "signal" in message:
            self._signal(int(message["signal"]))

    def _pass_on(self, number: int) -> None:
        """A signal that came here instead of to the supervisor: the supervisor gives it to every rank, this one too."""
        if number not in PASSED_ON:
            return
        if self.supervisor.closed:
            self._signal(number)
        else:
            self.supervisor.send({"event": "signal", "number": number})

    def _stop_alone(self) -> None:
        """The supervisor is gone: ask the rank to save and end, and make it end."""
        self.kill_at = self.kill_at or time.monotonic() + self.settings.grace
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        # to the rank alone: its data workers must live for as long as it needs them
        self.process.send_signal(number)

    def _kill(self) -> None:
        # the rank alone, here too: its descendants are swept once its status has been read, which a sweep would take away
        self.process.kill()

    def _report(self, status: int) -> None:
        """Last words: to the supervisor how the rank ended, to the front that it may end too."""
        self.supervisor.send({"event": "exit", "status": status})
        if self.supervisor.closed:
            remove_directory_of(self.settings.socket)
        with contextlib.suppress(OSError):
            self.front.send(DONE)
