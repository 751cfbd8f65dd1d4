"""The process in its job: rank, device, and the collectives that code outside the engine needs.

The only file that knows ranks. `start_runtime` joins the job, whoever started it; everything else asks the `Runtime`.
"""

import contextlib
import logging
import os
import resource
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from simmim_scale.engine.allocator import keep_freed_memory
from simmim_scale.engine.heartbeat import Heartbeat

logger = logging.getLogger(__name__)

# What torchrun and the DeepSpeed launcher both set in every process they start.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Runtime:
    """One process of the job. Every method but `memory_bytes` is collective: all ranks call it, in the same order.

    `heartbeat` tells the launcher's watchdog where this rank is; a collective that hangs is found by it.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes shared files and talks to the terminal."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum_ranks(0.0)

    def any_rank(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on at least one."""
        return self._reduce(float(flag), dist.ReduceOp.MAX) > 0

    def sum_ranks(self, value: float) -> float:
        """Sum of `value` over the ranks, in double precision; NaN and infinity propagate."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max_ranks(self, value: float) -> float:
        """Largest `value` of any rank."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def min_ranks(self, value: float) -> float:
        """Smallest `value` of any rank."""
        return self._reduce(value, dist.ReduceOp.MIN)

    def sum_in_place(self, values: torch.Tensor) -> torch.Tensor:
        """Replace `values` (on the device) by their sum over the ranks; the host of a GPU does not wait for it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The main rank's `value`, on every rank. It travels as a pickle, inside the job only."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def memory_bytes(self) -> int:
        """Most memory this rank has held so far: allocated on the GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

    def close(self) -> None:
        """Leave the job. Safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _reduce(self, value: float, operation: Any) -> float:
        # Double precision, so that a mean over ranks does not depend on how samples were dealt to them.
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, op=operation)
        return float(box.item())


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code, after everything is closed and without tearing down the interpreter.

    Threads of the communication library can abort that teardown ("terminate called without an active exception", seen once with
    torch 2.11 on gloo), and a finished run would look failed.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe has nothing to flush
            stream.flush()
    os._exit(code)


def start_runtime(timeout_minutes: float = 30.0, device: str = "auto") -> Runtime:
    """Join the job that torchrun or the DeepSpeed launcher started, or be a job of one process.

    Args:
        timeout_minutes: a collective that takes longer raises instead of hanging.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
    Raises:
        ValueError: no such device, half a launcher's environment, or more ranks on this node than GPUs.
    """
    heartbeat = Heartbeat.from_environment(os.environ)  # first: waiting for ranks that do not come can hang too
    place = launcher_place(os.environ)
    kind = choose_device(device)
    local_rank = place["local_rank"]
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"ranks: number {local_rank} (from 0) was started on a node with {torch.cuda.device_count()} GPUs."
            " Start at most one rank per GPU."
        )
    chosen = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    heartbeat.mark("meet")
    _join(kind, place["world_size"], timedelta(minutes=timeout_minutes))
    heartbeat.mark("build")
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, chosen, heartbeat)


def launcher_place(environment: Mapping[str, str]) -> dict[str, int]:
    """This process's place as a launcher's environment says it: local_rank and world_size. Pure.

    Without any launcher the place is the only rank of one. A half-set environment is an error, since waiting for
    ranks that nobody started looks like a hang.
    """
    present = [name for name in LAUNCHER_VARIABLES if name in environment]
    # A shell or a container may set MASTER_ADDR or MASTER_PORT for other reasons: they alone make no job.
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(present):
        return {"local_rank": 0, "world_size": 1}
    missing = [name for name in LAUNCHER_VARIABLES if name not in environment]
    if missing:
        raise ValueError(
            f"environment: {', '.join(present)} are set but {', '.join(missing)} not, so the other ranks cannot be found."
            " Start through `python -m launch` or torchrun, or unset them to run alone."
        )
    return {"local_rank": int(environment["LOCAL_RANK"]), "world_size": int(environment["WORLD_SIZE"])}


def choose_device(device: str) -> str:
    """The kind of device, cpu or cuda, for a request of auto, cpu or cuda; DS_ACCELERATOR=cpu makes auto choose the CPU."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: one of auto, cpu, cuda, got {device!r}.")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("device: cuda was asked for, but PyTorch sees no GPU here. Choose cpu or auto, or check the driver.")
    if device == "auto":
        return "cuda" if available and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    return device


def _join(kind: str, world_size: int, timeout: timedelta) -> None:
    """Start torch.distributed and DeepSpeed's view of it."""
    deepspeed = _import_deepspeed(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    if world_size == 1 and not dist.is_initialized():
        # A job of one needs no port, so it cannot collide with another job on this machine. DeepSpeed reads these
        # variables in places, and takes their absence for an MPI job.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)


def _import_deepspeed(kind: str) -> Any:
    """Import DeepSpeed for this kind of device; it reads DS_ACCELERATOR once, at import."""
    os.environ["DS_ACCELERATOR"] = kind
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    found = get_accelerator().device_name()
    if not found.startswith(kind):
        raise ValueError(
            f"device: DeepSpeed was already imported for {found}, got {kind}. Call start_runtime before importing it."
        )
    # Its log goes to stdout and repeats what the run header says; what needs attention is an error or our own message.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19.8 calls collectives by names that PyTorch 2.14 renames, several times a step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if kind == "cpu":
        # DeepSpeed compiles this op at start (40-50 s), yet only inference_all_reduce ever calls it
        # (deepspeed/comm/torch.py); everything trained here goes through gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
