"""What this node has: devices, cores, a free port. Found without importing torch, which takes seconds."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.hostfile import MOST_SLOTS

# Device files of NVIDIA (also in WSL) and AMD GPUs: without any of them torch need not be asked.
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")


def find_devices(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that ranks may use, as CUDA_VISIBLE_DEVICES names them; none with DS_ACCELERATOR=cpu."""
    if environment.get("DS_ACCELERATOR") == "cpu" or not any(Path(file).exists() for file in GPU_FILES):
        return []
    count = _count_devices()
    # DeepSpeed's launcher overwrites the variable, so what it already says must be handed to it.
    visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[:count] if visible else [str(index) for index in range(count)]


def _count_devices() -> int:
    """In a process of its own: CUDA started here would hold memory on a device for the whole run."""
    code = "import torch; print(torch.cuda.device_count())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = result.stdout.split()[-1:]
    return int(last[0]) if result.returncode == 0 and last else 0


def choose_devices(ranks: str, devices: Sequence[str]) -> list[str]:
    """The device of each rank.

    Args:
        ranks: a number, or `auto` for one rank per GPU, or one rank where there is none.
        devices: the GPUs of this node; without any, ranks run on the CPU and their devices are mere numbers.

    Raises:
        ValueError: not a positive number, or more ranks than GPUs.
    """
    if ranks == "auto":
        return list(devices) or ["0"]
    if not ranks.isdecimal() or not 1 <= int(ranks) <= MOST_SLOTS:
        raise ValueError(f"--ranks: got {ranks!r}, expected a number from 1 to {MOST_SLOTS}, or auto for one rank per GPU.")
    count = int(ranks)
    if not devices:
        return [str(index) for index in range(count)]
    if count > len(devices):
        raise ValueError(
            f"--ranks: got {count}, but this node has {len(devices)} GPUs ({', '.join(devices)}). "
            f"Use at most {len(devices)}, or set DS_ACCELERATOR=cpu to run on the CPU."
        )
    return list(devices[:count])


def threads_per_rank(ranks: int) -> int:
    """Cores that this process may use, shared out; more threads than cores only wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def free_port() -> int:
    """A TCP port on the loopback device that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raises:
    ValueError: `port` is no port, or something listens on it, which the ranks would meet as a hang or a strange error.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--master-port: got {port}, expected a number from 1 to 65535. Leave it out for a free one.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"--master-port: {port} cannot be used ({error.strerror}). Leave it out for a free one.") from error
