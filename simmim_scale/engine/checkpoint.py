"""The store of run states: a save is complete or invisible, and the newest complete one is found by its manifest.

RUN_DIR/checkpoints/step_00000100/manifest.json lists every file and its size; it is written last, into a directory that gets
its name after that. What this store did not write completely, it neither resumes from nor deletes.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim_scale.config.schema import CheckpointConfig
from simmim_scale.engine.engine import Engine
from simmim_scale.engine.mirror import MANIFEST, Mirror
from simmim_scale.engine.runtime import Runtime
from simmim_scale.engine.state import Snapshot
from simmim_scale.engine.write_behind import Writing

logger = logging.getLogger(__name__)

FORMAT = "simmim-run-state"
VERSION = 2  # 1: DeepSpeed's own files, which only its number of ranks could read
LATEST = "latest"
MARKER = ".simmim-unfinished"  # in a directory that this store is writing or removing
UNFINISHED = ".unfinished-"
NAME = re.compile(r"step_(\d{8,})(?:\.\d+)?")


@dataclass(frozen=True)
class SavedState:
    """A complete save: its directory, its step, and the client state that was given to `save`."""

    path: Path
    step: int
    client_state: Mapping[str, Any]


@dataclass(frozen=True)
class SaveCost:
    """What a save took.

    Attributes:
        nbytes: size on the disk, of all ranks. still: seconds that training stood still for it. seconds: until it was complete.
    """

    step: int
    nbytes: int
    still: float
    seconds: float


class RunStateStore:
    """Saves in one directory, usually RUN_DIR/checkpoints. Its methods are collective; the main rank alone moves files.

    Raises:
        ValueError: the mirror's URL cannot be opened.
    """

    def __init__(self, directory: Path, runtime: Runtime, config: CheckpointConfig) -> None:
        self.directory = directory
        self._runtime = runtime
        self._config = config
        self._mirror = Mirror(config.mirror, config.mirror_options) if config.mirror and runtime.is_main else None
        self._writing: Writing | None = None
        self._cost: SaveCost | None = None

    def save(self, engine: Engine, client_state: Mapping[str, Any]) -> None:
        """Make a complete save of the engine's step and let older ones go.

        With `checkpoint.asynchronous` it is complete some time later: `wait` knows. One that is under way is waited for.

        Args:
            client_state: JSON-like, for instance the position in the data; it comes back in `SavedState.client_state`.
        Raises:
            OSError: this save, or the one before it, could not be written; raised on every rank, and no older save is touched.
        """
        self.wait()
        began = time.monotonic()
        aside = Path(self._on_main(lambda: str(self._begin(engine.step))))
        seal = _Seal(engine.step, client_state, began)
        try:
            snapshot = engine.snapshot()
            if self._config.asynchronous:
                self._writing = self._write_behind(snapshot.copied(), aside, seal.standing_still())
                return
            self._on_every_rank(lambda: _write(snapshot, aside))
            self._on_main(lambda: self._seal(aside, seal))
        except OSError:
            self._on_main(lambda: _remove_unfinished(self.directory))  # half a save may be what fills the disk
            raise

    def wait(self) -> None:
        """Wait until the save that is being written is complete; at once when there is none.

        Raises:
            OSError: it could not be written; raised on every rank.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        failures = [text for text in self._runtime.gather_objects(writing.join_writer()) if text]
        sealing = writing.join_sealer(give_up=bool(failures))
        failure = self._runtime.broadcast_object(failures[0] if failures else sealing)
        if failure:
            self._on_main(lambda: _remove_unfinished(self.directory))
            raise OSError(f"{self.directory}: {failure}. Free space or fix the disk; older saves are untouched.")

    def take_cost(self) -> SaveCost | None:
        """What the latest complete save took, once, on the main rank; else None."""
        cost, self._cost = self._cost, None
        return cost

    def load(self, engine: Engine, saved: SavedState) -> None:
        """Continue from a save; see `Engine.load` for what is refused."""
        engine.load(saved.path)

    def newest(self) -> SavedState | None:
        """The complete save with the highest step; None when there is none. Every rank gets the main rank's answer.

        Where the directory has none, the newest one of the mirror is fetched into it.

        Raises:
            ValueError: the mirror cannot be read: beginning anew without being told to would lose the run.
        """
        saved = self._on_main(lambda: max(complete_saves(self.directory), key=lambda saved: saved.step, default=None))
        if saved is not None or not self._config.mirror:
            return saved
        saved, failure = self._runtime.broadcast_object(self._fetch() if self._runtime.is_main else None)
        if failure:
            raise ValueError(
                f"checkpoint.mirror: {self._config.mirror} could not be read ({failure}), and {self.directory} holds no save."
                " Make it reachable, or set checkpoint.mirror to null to begin anew."
            )
        return saved

    def _fetch(self) -> tuple[SavedState | None, str | None]:
        """The mirror's newest save, now in the directory; and what went wrong."""
        assert self._mirror is not None
        try:
            names = [name for name in self._mirror.names() if NAME.fullmatch(name)]
            if not names:
                return None, None
            name = max(names, key=_step_of)
            logger.info("no save in %s: fetching %s from %s", self.directory, name, self._mirror.url)
            aside = self._begin(_step_of(name))
            self._mirror.download(name, aside)
            return read_save(self._publish(aside, name)), None
        except Exception as error:  # noqa: BLE001 - every back end of fsspec has errors of its own
            return None, f"{type(error).__name__}: {error}"

    def _write_behind(self, snapshot: Snapshot, aside: Path, seal: "_Seal") -> Writing:
        runtime = self._runtime
        return Writing(
            lambda: _write(snapshot, aside),
            aside,
            rank=runtime.rank,
            world_size=runtime.world_size,
            seal=(lambda: self._seal(aside, seal)) if runtime.is_main else None,
        )

    def _seal(self, aside: Path, seal: "_Seal") -> None:
        """Everything that the main rank does once all ranks' files are there."""
        final, nbytes = self._finish(aside, seal.step, seal.client_state)
        self._retain()
        if self._mirror is not None:
            self._copy_to_mirror(self._mirror, final)
        seconds = time.monotonic() - seal.began
        still = seconds if seal.still is None else seal.still
        self._cost = SaveCost(seal.step, nbytes, still, seconds)
        logger.info("saved step %d: %.3f GB in %.2f s, training stood still %.2f s", seal.step, nbytes / 1e9, seconds, still)

    def _copy_to_mirror(self, mirror: Mirror, save: Path) -> None:
        """A mirror that fails does not end the run: the save is complete here, and the next one is tried again."""
        began = time.monotonic()
        try:
            mirror.upload(save)
            for name in self._surplus(name for name in mirror.names() if NAME.fullmatch(name)):
                mirror.remove(name)
        except Exception as error:  # noqa: BLE001 - every back end of fsspec has errors of its own
            logger.warning("%s was not copied to %s: %s: %s", save.name, mirror.url, type(error).__name__, error)
        else:
            logger.info("copied %s to %s in %.2f s", save.name, mirror.url, time.monotonic() - began)

    def _begin(self, step: int) -> Path:
        """An empty directory, marked as ours and unfinished."""
        self.directory.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self.directory)
        aside = _fresh(self.directory / f"{UNFINISHED}{_name(step)}")
        aside.mkdir()
        (aside / MARKER).touch()
        return aside

    def _finish(self, aside: Path, step: int, client_state: Mapping[str, Any]) -> tuple[Path, int]:
        """Seal the directory with its manifest and give it its name; the name, and the bytes that the manifest lists."""
        sizes = _sizes(aside)
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": sizes, "client_state": dict(client_state)}
        _write_synced(aside / MANIFEST, json.dumps(manifest, indent=1))
        return self._publish(aside, _name(step)), sum(sizes.values())

    def _publish(self, aside: Path, name: str) -> Path:
        """Give a sealed directory its name, and point `latest` to it."""
        for folder in {path.parent for path in aside.rglob("*") if path.is_file()} | {aside}:
            _sync(folder)
        final = _fresh(self.directory / name)
        aside.rename(final)
        (final / MARKER).unlink()  # after the renaming: until then the marker says that a leftover is ours to remove
        _sync(self.directory)
        pointer = self.directory / f"{UNFINISHED}{LATEST}"
        _write_synced(pointer, final.name + "\n")
        pointer.replace(self.directory / LATEST)
        _sync(self.directory)
        return final

    def _retain(self) -> None:
        """Remove complete saves that need not be kept; what else lies in the directory is not ours to remove."""
        saves = {saved.path.name: saved.path for saved in complete_saves(self.directory)}
        for name in self._surplus(saves):
            _remove_complete(saves[name])

    def _surplus(self, names: Iterable[str]) -> list[str]:
        """Of the names of saves those beyond the newest `keep` and not kept for good."""
        for_good = self._config.keep_every_steps
        older = sorted(names, key=_step_of)[: -self._config.keep]
        return [name for name in older if for_good is None or _step_of(name) % for_good]

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on the main rank; every rank gets its result, or its OSError."""
        result, failure = None, None
        if self._runtime.is_main:
            try:
                result = action()
            except OSError as error:
                failure = f"{self.directory}: {error}. Free space or fix the disk; older saves are untouched."
        result, failure = self._runtime.broadcast_object((result, failure))
        if failure:
            raise OSError(failure)
        return result

    def _on_every_rank(self, action: Callable[[], Any]) -> None:
        """Run `action` on every rank; if it fails on one, all raise OSError, so that none waits for the others."""
        failure = None
        try:
            action()
        except OSError as error:
            failure = str(error)
        failures = [text for text in self._runtime.gather_objects(failure) if text]
        if failures:
            raise OSError(f"{self.directory}: {failures[0]}. Free space or fix the disk; older saves are untouched.")


@dataclass(frozen=True)
class _Seal:
    """What sealing needs: step, client state, when the save began, and how long training stood still (None: until the end)."""

    step: int
    client_state: Mapping[str, Any]
    began: float
    still: float | None = None

    def standing_still(self) -> "_Seal":
        """Training goes on from now."""
        return _Seal(self.step, dict(self.client_state), self.began, time.monotonic() - self.began)


def _write(snapshot: Snapshot, folder: Path) -> None:
    """Write this rank's files and flush them to the disk."""
    for path in snapshot.write(folder):
        _sync(path)


def complete_saves(directory: Path) -> list[SavedState]:
    """The complete saves in a directory, in no order: right name, our manifest, every listed file there with its size."""
    if not directory.is_dir():
        return []
    candidates = (read_save(path) for path in directory.iterdir() if NAME.fullmatch(path.name) and path.is_dir())
    return [saved for saved in candidates if saved is not None]


def read_save(path: Path) -> SavedState | None:
    """A save that is complete, else None. What is wrong is logged, since a person may wonder why it is passed over."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT or manifest["version"] > VERSION:
            raise ValueError(f"format {manifest['format']} {manifest['version']} is not {FORMAT} {VERSION}")
        wrong = [name for name, size in manifest["files"].items() if not _is_whole(path / name, size)]
        if wrong or not manifest["files"]:
            raise ValueError(
                f"{len(wrong)} of {len(manifest['files'])} files are missing or have another size: {', '.join(wrong[:3])}"
            )
        return SavedState(path, int(manifest["step"]), manifest["client_state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is not a complete save and is passed over: %s", path, error)
        return None


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match is not None, f"{name} is no name of a save"
    return int(match[1])


def _fresh(path: Path) -> Path:
    """`path`, or with the first free suffix .1, .2, ...: what lies there is truncated or somebody else's."""
    candidate, suffix = path, 0
    while candidate.exists():
        suffix += 1
        candidate = path.with_name(f"{path.name}.{suffix}")
    return candidate


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below a folder, by its path inside it; our marker aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _remove_unfinished(directory: Path) -> None:
    """Remove what this store left behind when it was killed: directories with its prefix and its marker."""
    for path in directory.glob(f"{UNFINISHED}*"):
        if (path / MARKER).is_file():
            shutil.rmtree(path)


def _remove_complete(path: Path) -> None:
    """Remove a complete save, unless something was put beside its files."""
    listed = set(json.loads((path / MANIFEST).read_text())["files"]) | {MANIFEST}
    if set(_sizes(path)) != listed:
        logger.warning("%s holds files that are not part of the save, so it is kept; move them away if it may go", path)
        return
    # Renamed first: a directory half removed must not look like a save, and the marker lets the next save finish the job.
    (path / MARKER).touch()
    doomed = _fresh(path.with_name(f"{UNFINISHED}{path.name}"))
    path.rename(doomed)
    shutil.rmtree(doomed)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
