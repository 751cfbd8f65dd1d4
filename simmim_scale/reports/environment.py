"""Facts about the machine, the packages and the code, for the run header and for `environment.json`."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil
import torch

from simmim_scale.reports.records import GIB

SHOWN_PACKAGES = ("simmim-scale", "torch", "torchvision", "deepspeed", "triton", "timm", "webdataset", "numpy")


def package_versions(names: tuple[str, ...] = SHOWN_PACKAGES) -> dict[str, str]:
    """Python and the installed ones of `names`, with their versions."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_version(directory: Path | None = None) -> str | None:
    """Commit of the checkout around `directory` (None: this package), "-dirty" with changes; None without a checkout or git.

    A container image has no checkout: it says which commit it was built from in SIMMIM_REVISION.
    """
    if directory is None and os.environ.get("SIMMIM_REVISION"):
        return os.environ["SIMMIM_REVISION"]
    where = directory or Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=where,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def describe_device(device: torch.device) -> str:
    """The device in words: "NVIDIA H200, 139 GiB" or "cpu, 2 threads"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads"


def describe_machine() -> dict[str, str]:
    """Operating system, processor, cores and memory of this node."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / GIB:.1f} GiB",
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that tensors took on a CUDA device since the start; on the CPU the resident memory of this process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
