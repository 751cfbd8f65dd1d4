"""Replace a file in one go, so that a reader (or a crash) never sees half of it."""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` aside in the same directory, sync it to disk and rename it to `path`.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full; `path` is then unchanged.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
