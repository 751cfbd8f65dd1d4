"""sha256 of files, by blocks."""

import hashlib
from pathlib import Path

_READ = 2**22  # bytes at a time


def hash_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()
