"""What `python -m launch check` has a node find out about itself: each is a task with plain values in and out."""

import hashlib
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from simmim_scale.data.shards import ShardIndex

MATRIX = {"cuda": 8192, "cpu": 768}  # side of the square matrices that are multiplied
REPEATS = {"cuda": 20, "cpu": 5}
TRANSFER_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}
TRANSFERS = 4
PAIR_SECONDS = 60.0  # until two nodes have found each other

Task = Callable[..., dict[str, Any]]


def clock() -> dict[str, Any]:
    return {"time": time.time()}


def disk(run_dir: str) -> dict[str, Any]:
    """Free bytes where runs write: the run directory (or its nearest parent that exists), temporary files, shared memory."""
    path = Path(run_dir).absolute()
    while not path.exists():
        path = path.parent
    places = {"run_dir": path, "tmp": Path(os.environ.get("TMPDIR", "/tmp")), "shm": Path("/dev/shm")}
    free = {name: shutil.disk_usage(place).free for name, place in places.items() if place.exists()}
    return {"free": free, "place": str(path), "writable": os.access(path, os.W_OK)}


def write_token(run_dir: str) -> dict[str, Any]:
    """Puts a file into the run directory that the other nodes must see; `remove_token` takes it away again."""
    path = Path(run_dir)
    made = [str(parent) for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    token = path / f".check-{secrets.token_hex(6)}"
    token.write_text(secrets.token_hex(16))
    return {"path": str(token), "content": token.read_text(), "made": made}


def read_token(path: str) -> dict[str, Any]:
    # Network file systems keep what they know of a directory for some seconds
    end = time.monotonic() + 5
    while not Path(path).exists() and time.monotonic() < end:
        os.listdir(Path(path).parent) if Path(path).parent.exists() else None
        time.sleep(0.2)
    return {"content": Path(path).read_text() if Path(path).exists() else None}


def remove_token(path: str, made: list[str]) -> dict[str, Any]:
    Path(path).unlink(missing_ok=True)
    for folder in made:
        try:
            os.rmdir(folder)
        except OSError:
            break  # something else has been put there
    return {}


def data(directories: list[str]) -> dict[str, Any]:
    """For each directory of shards: a digest of its index and what is missing of its files."""
    return {directory: _shards(Path(directory)) for directory in directories}


def _shards(directory: Path) -> dict[str, Any]:
    try:
        index = ShardIndex.load(directory)
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(directory.glob("index.*"))))
    return {"digest": digest.hexdigest()[:12], "samples": len(index)}


def apex() -> dict[str, Any]:
    """Which apex is installed: none, nvidia (with or without CUDA extensions), or other: PyPI has another one of that name."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return {"kind": "none"}
    places = [Path(place) for place in found.submodule_search_locations or []]
    if not any((place / "optimizers").is_dir() and (place / "normalization").is_dir() for place in places):
        return {"kind": "other", "place": str(places[0]) if places else str(found.origin)}
    return {"kind": "nvidia", "extensions": importlib.util.find_spec("amp_C") is not None}


def gpus(slots: list[int]) -> dict[str, Any]:
    """Name, memory and free memory of the GPUs of these slots; empty on a node without any."""
    import torch

    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return {"gpus": []}
    found = []
    for slot in slots:
        if slot < torch.cuda.device_count():
            free, total = torch.cuda.mem_get_info(slot)
            found.append({"slot": slot, "name": torch.cuda.get_device_name(slot), "total": total, "free": free})
    return {"gpus": found, "count": torch.cuda.device_count(), "cuda": torch.version.cuda}


def compute(slots: list[int]) -> dict[str, Any]:
    """Seconds of a matrix product on each device of these slots, or on the CPU: the median of several."""
    import torch

    kind = _kind()
    devices = [torch.device("cuda", slot) for slot in slots] if kind == "cuda" else [torch.device("cpu")]
    return {"seconds": {str(device): _product_seconds(device) for device in devices}, "machine": platform.machine()}


def _product_seconds(device: Any) -> float:
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.ones(MATRIX[device.type], MATRIX[device.type], device=device, dtype=dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(REPEATS[device.type] + 1):
        wait()
        began = time.perf_counter()
        matrix @ matrix
        wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])  # the first one loads libraries


def dial(address: str, port: int) -> dict[str, Any]:
    try:
        socket.create_connection((address, port), timeout=10).close()
    except OSError as error:
        return {"error": f"cannot connect to {address} port {port}: {error}"}
    return {}


def transfer(address: str, port: int, rank: int, slot: int) -> dict[str, Any]:
    """Bytes per second of an all-reduce between two nodes, over the back end that training uses.

    Args:
        address, port: where the two meet; the one with rank 0 listens.
        slot: the GPU to use, where there is one.
    """
    import torch
    import torch.distributed as dist

    kind = _kind()
    device = torch.device("cuda", slot) if kind == "cuda" else torch.device("cpu")
    patience = timedelta(seconds=PAIR_SECONDS)
    try:
        store = dist.TCPStore(address, port, 2, is_master=rank == 0, timeout=patience, wait_for_workers=False)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=patience)
        block = torch.ones(TRANSFER_BYTES[kind] // 4, device=device)
        seconds = []
        for _ in range(TRANSFERS + 1):
            began = time.perf_counter()
            dist.all_reduce(block)
            if kind == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    except (RuntimeError, ValueError) as error:
        return {"error": str(error).splitlines()[0]}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return {"bytes_per_second": TRANSFER_BYTES[kind] / statistics.median(seconds[1:]), "backend": backend}


def _kind() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


class Door:
    """A port that is open between two questions."""

    def __init__(self) -> None:
        self._server: socket.socket | None = None

    def serve(self, port: int) -> dict[str, Any]:
        """Opens the port that the ranks would meet at; 0 takes a free one."""
        try:
            self._server = socket.create_server(("", port), backlog=1024)
        except OSError as error:
            return {"error": f"port {port} cannot be opened: {error.strerror}"}
        return {"port": self._server.getsockname()[1]}

    def close(self) -> dict[str, Any]:
        if self._server is not None:
            self._server.close()
        return {}


def make_tasks() -> dict[str, Task]:
    """The questions by name."""
    door = Door()
    plain = (clock, disk, write_token, read_token, remove_token, data, apex, gpus, compute, dial, transfer)
    return {**{task.__name__: task for task in plain}, "serve": door.serve, "close_server": door.close}
