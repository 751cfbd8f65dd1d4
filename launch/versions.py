"""What a node runs: the code, the packages and Python. Ranks with different ones fail late and strangely, or train wrongly."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = ("simmim_scale", "launch")
# What computes, talks or decides the order of samples. Others may differ.
PACKAGES = ("torch", "torchvision", "deepspeed", "triton", "timm", "numpy", "pydantic", "webdataset", "apex")
COMMIT, SOURCE = "commit", "source"


def identify() -> dict[str, str]:
    """The versions of this process's code and packages; what is not installed is left out."""
    found = {SOURCE: source_digest(), "python": platform.python_version()}
    commit = _commit()
    if commit:
        found[COMMIT] = commit
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_digest(root: Path = ROOT) -> str:
    """A digest of the Python files: two checkouts of one commit with different changes have different ones."""
    digest = hashlib.sha256()
    for package in OWN:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """What differs, as `torch 2.14.1 instead of 2.13.0`. Equal sources need no equal commit: a copy has none."""
    names = [name for name in {**here, **there} if name not in (COMMIT, SOURCE) and here.get(name) != there.get(name)]
    found = [f"{name} {there.get(name, 'missing')} instead of {here.get(name, 'none')}" for name in names]
    if here.get(SOURCE) != there.get(SOURCE):
        found.insert(0, f"code {_code(there)} instead of {_code(here)}")
    return found


def _code(versions: Mapping[str, str]) -> str:
    return f"{versions.get(COMMIT, 'without git')} (source {versions.get(SOURCE, 'unknown')})"


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
