"""Writing a save while training goes on: a thread on each rank writes, a thread on the main rank seals when all have.

The ranks tell each other through files in the save's directory, since collectives belong to training. A process that dies
leaves a directory without a manifest, which is no save.
"""

import threading
from collections.abc import Callable
from pathlib import Path

WRITTEN = ".simmim-written-"  # and the rank's number: its files are complete and on the disk
LOOK_EVERY = 0.05  # seconds between two looks for these files


class Writing:
    """A save that is being written.

    Args:
        write: writes and syncs this rank's files.
        folder: where; shared by the ranks.
        seal: makes it a complete save, on the main rank; None on the others.
    """

    def __init__(self, write: Callable[[], None], folder: Path, *, rank: int, world_size: int, seal: Callable[[], None] | None):
        self._write, self._folder, self._rank, self._world_size = write, folder, rank, world_size
        self._given_up = threading.Event()
        self.write_failure: str | None = None
        self.seal_failure: str | None = None
        # Daemons: a process that has to end does not wait for them; what they were writing is no save then.
        self._writer = threading.Thread(target=self._run_write, name="save", daemon=True)
        self._sealer = None if seal is None else threading.Thread(target=self._run_seal, args=(seal,), name="seal", daemon=True)
        self._writer.start()
        if self._sealer is not None:
            self._sealer.start()

    def join_writer(self) -> str | None:
        """Wait until this rank's files are written; what went wrong, or None."""
        self._writer.join()
        return self.write_failure

    def join_sealer(self, *, give_up: bool) -> str | None:
        """Wait until the save is sealed, or stop waiting for ranks that failed; what went wrong, or None."""
        if self._sealer is None:
            return None
        if give_up:
            self._given_up.set()
        self._sealer.join()
        return self.seal_failure

    def _run_write(self) -> None:
        try:
            self._write()
            (self._folder / f"{WRITTEN}{self._rank}").touch()
        except (OSError, RuntimeError) as error:
            self.write_failure = str(error)

    def _run_seal(self, seal: Callable[[], None]) -> None:
        markers = [self._folder / f"{WRITTEN}{rank}" for rank in range(self._world_size)]
        while not all(marker.exists() for marker in markers):
            if self._given_up.wait(LOOK_EVERY):
                return
        try:
            for marker in markers:
                marker.unlink()
            seal()
        except OSError as error:
            self.seal_failure = str(error)
