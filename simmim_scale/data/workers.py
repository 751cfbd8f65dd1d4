"""Worker processes: how many load ahead, how they start, and how they end without leaving anything behind."""

import atexit
import logging
import os
import signal
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from simmim_scale.data.block import Block
from simmim_scale.data.dataset import Batch, BatchRequest, DamagedSample, Loaded, LoadError, ShardDataset

log = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"
Sent = tuple[Block, list[DamagedSample]] | LoadError
# What a job manager or a terminal sends to every process of a job. Workers serve the rank until it has saved and ends them.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@dataclass(frozen=True)
class Workers:
    """`count` processes (0: the caller's own), `prefetch` micro-batches ahead each; `pin_memory` page-locks what they bring."""

    count: int
    prefetch: int = 4
    pin_memory: bool = False

    def start(self, dataset: ShardDataset, requests: Iterable[BatchRequest]) -> "BatchStream":
        """Loads `requests` in order, ahead of the caller; they may be endless."""
        with warnings.catch_warnings():
            # `warn_of_cores` says it once and shortly.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                dataset,
                batch_sampler=requests,  # type: ignore[arg-type]
                num_workers=self.count,
                prefetch_factor=self.prefetch if self.count else None,
                collate_fn=_to_block if self.count else _as_is,
                pin_memory=self.pin_memory,
                worker_init_fn=_outlive_signals,
                # Its own, since DataLoader otherwise draws from torch's global generator.
                generator=torch.Generator(),
            )
            return BatchStream(loader, self)

    def warn_of_cores(self) -> bool:
        """Logs a warning, and returns True, where there are more workers than cores that this process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.count <= cores:
            return False
        log.warning("data.workers: %d processes per rank share %d cores; more than %d bring nothing.", self.count, cores, cores)
        return True


class BatchStream:
    """Iterates over loaded micro-batches; `close()` (or leaving its context) ends the workers."""

    def __init__(self, loader: "DataLoader[Any]", workers: Workers):
        self._workers = workers
        self._iterator: Iterator[Sent | Loaded] | None = iter(loader)
        self._memory_checked = not workers.count
        # multiprocessing waits at exit for workers that nobody told to end; this runs before it, having been registered later.
        self._at_exit = _closer(weakref.ref(self))
        atexit.register(self._at_exit)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> tuple[Batch, list[DamagedSample]]:
        if self._iterator is None:
            raise RuntimeError("this stream of batches is closed; start another one.")
        loaded = next(self._iterator)
        if isinstance(loaded, Exception):
            raise loaded
        content, damaged = loaded
        batch = content.unpack() if isinstance(content, Block) else content
        if not self._memory_checked:
            self._memory_checked = True
            warn_of_shared_memory(batch, num_batches=self._workers.count * self._workers.prefetch)
        return batch, damaged

    def close(self) -> None:
        atexit.unregister(self._at_exit)
        iterator, self._iterator = self._iterator, None
        # Dropping the iterator ends its workers too, but only once nothing (a traceback, say) refers to it.
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_iterator", None) is not None:
            self.close()


def warn_of_shared_memory(batch: Batch, *, num_batches: int, directory: str = SHARED_MEMORY) -> bool:
    """Logs a warning, and returns True, where batches that wait may not fit into shared memory: containers often get 64 MB, and a
    worker that runs out of it dies of a bus error without a word."""
    if not os.path.isdir(directory):
        return False
    needed = num_batches * sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    status = os.statvfs(directory)
    size = status.f_blocks * status.f_frsize
    if needed <= size:
        return False
    log.warning(
        "%s holds %d MB, but this rank's waiting batches may need %d MB. Workers that run out of it die of a bus error: raise the"
        " limit (docker run --shm-size, or --ipc=host), or lower data.workers, data.prefetch or train.micro_batch.",
        directory,
        size // 2**20,
        -(-needed // 2**20),
    )
    return True


def _closer(stream: "weakref.ref[BatchStream]") -> Any:
    def close() -> None:
        alive = stream()
        if alive is not None:
            alive.close()

    return close


def _outlive_signals(worker: int) -> None:
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _as_is(loaded: Loaded) -> Loaded:
    return loaded


def _to_block(loaded: Loaded) -> Sent:
    """In a worker: what it sends to the rank."""
    return loaded if isinstance(loaded, Exception) else (Block.pack(loaded[0]), loaded[1])
