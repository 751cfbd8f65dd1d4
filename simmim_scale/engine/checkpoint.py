"""The store of run states: a save is complete or invisible, and the newest complete one is found by its manifest.

RUN_DIR/checkpoints/step_00000100/manifest.json lists every file and its size; it is written last, into a directory that gets
its name after that. What this store did not write completely, it neither resumes from nor deletes.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmim_scale.config.schema import CheckpointConfig
from simmim_scale.engine.engine import Engine
from simmim_scale.engine.runtime import Runtime

logger = logging.getLogger(__name__)

FORMAT = "simmim-run-state"
VERSION = 2  # 1: DeepSpeed's own files, which only its number of ranks could read
MANIFEST = "manifest.json"
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


class RunStateStore:
    """Saves in one directory, usually RUN_DIR/checkpoints. Its methods are collective; the main rank alone moves files."""

    def __init__(self, directory: Path, runtime: Runtime, config: CheckpointConfig) -> None:
        self.directory = directory
        self._runtime = runtime
        self._config = config

    def save(self, engine: Engine, client_state: Mapping[str, Any]) -> Path:
        """Make a complete save of the engine's step and let older ones go; returns its directory.

        Args:
            client_state: JSON-like, for instance the position in the data; it comes back in `SavedState.client_state`.
        Raises:
            OSError: something could not be written; raised on every rank, and no older save is touched.
        """
        aside = Path(self._on_main(lambda: str(self._begin(engine.step))))
        try:
            snapshot = engine.snapshot()
            self._on_every_rank(lambda: [_sync(path) for path in snapshot.write(aside)])
            final = Path(self._on_main(lambda: str(self._finish(aside, engine.step, client_state))))
        except OSError:
            self._on_main(lambda: _remove_unfinished(self.directory))  # half a save may be what fills the disk
            raise
        self._on_main(self._retain)
        return final

    def load(self, engine: Engine, saved: SavedState) -> None:
        """Continue from a save; see `Engine.load` for what is refused."""
        engine.load(saved.path)

    def newest(self) -> SavedState | None:
        """The complete save with the highest step; None when there is none. Every rank gets the main rank's answer."""
        return self._on_main(lambda: max(complete_saves(self.directory), key=lambda saved: saved.step, default=None))

    def _begin(self, step: int) -> Path:
        """An empty directory, marked as ours and unfinished."""
        self.directory.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self.directory)
        aside = _fresh(self.directory / f"{UNFINISHED}{_name(step)}")
        aside.mkdir()
        (aside / MARKER).touch()
        return aside

    def _finish(self, aside: Path, step: int, client_state: Mapping[str, Any]) -> Path:
        """Seal the directory with its manifest, give it its name, and point `latest` to it."""
        sizes = _sizes(aside)
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": sizes, "client_state": dict(client_state)}
        _write_synced(aside / MANIFEST, json.dumps(manifest, indent=1))
        for folder in {(aside / name).parent for name in sizes} | {aside}:
            _sync(folder)
        final = _fresh(self.directory / _name(step))
        aside.rename(final)
        (final / MARKER).unlink()  # after the renaming: until then the marker says that a leftover is ours to remove
        _sync(self.directory)
        pointer = self.directory / f"{UNFINISHED}{LATEST}"
        _write_synced(pointer, final.name + "\n")
        pointer.replace(self.directory / LATEST)
        _sync(self.directory)
        return final

    def _retain(self) -> None:
        """Remove complete saves beyond the newest `keep`; what else lies in the directory is not ours to remove."""
        saves = sorted(complete_saves(self.directory), key=lambda saved: saved.step)
        for_good = self._config.keep_every_steps
        for saved in saves[: -self._config.keep]:
            if for_good is None or saved.step % for_good:
                _remove_complete(saved.path)

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
