"""Downloads remote shards before their samples are due, in threads of the rank's process."""

import logging
import threading
import time
from queue import SimpleQueue

import numpy as np

from simmim_scale.data.cache import RECENT, ShardCache
from simmim_scale.data.order import LaneBlock, SampleOrder

log = logging.getLogger(__name__)

# How long `close` waits for a download that is under way, seconds. A process that ends leaves it to the next one to clean up.
PATIENCE = 5.0
# A shard to fetch and when it was asked for; None ends a thread.
Queue = SimpleQueue[tuple[int, int] | None]


class ShardPrefetcher:
    """Keeps the shards in the cache that a rank reads now, then fetches those that it reads next.

    Args:
        cache: Of the node.
        order: Of the samples.
        downloads: Shards that are downloaded at the same time.
    """

    def __init__(self, cache: ShardCache, order: SampleOrder, *, downloads: int):
        self.cache = cache
        self.order = order
        self.downloads = downloads
        self._blocks: list[LaneBlock] = []
        self._touched = 0.0
        self._generation = 0
        self._threads: list[threading.Thread] = []
        self._queue: Queue = SimpleQueue()

    def advance(self, positions: np.ndarray) -> None:
        """Tells which positions the rank loads now."""
        blocks = self.order.blocks_in_play(positions)
        if blocks == self._blocks and time.monotonic() - self._touched < RECENT / 4:
            return
        self._blocks, self._touched = blocks, time.monotonic()
        now = self._shards(blocks)
        later = [shard for shard in self._shards([self.order.block_after(block) for block in blocks]) if shard not in now]
        self._generation += 1
        self._start()
        for shard in [*now, *later]:
            self.cache.touch(shard)
            self._queue.put((shard, self._generation))

    def close(self) -> None:
        """Stops; a download that is under way gets a moment to finish."""
        self._generation += 1
        threads, self._threads, self._blocks = self._threads, [], []
        for _ in threads:
            self._queue.put(None)
        self._queue = SimpleQueue()
        for thread in threads:
            thread.join(PATIENCE)

    def _start(self) -> None:
        """Starts threads that do not keep the process from ending, after the workers have been forked."""
        for number in range(len(self._threads), self.downloads):
            self._threads.append(threading.Thread(target=self._work, args=(self._queue,), name=f"shards-{number}", daemon=True))
            self._threads[-1].start()

    def _work(self, queue: Queue) -> None:
        while (wanted := queue.get()) is not None:
            self._fetch(*wanted)

    def _shards(self, blocks: list[LaneBlock]) -> list[int]:
        return list(dict.fromkeys(shard for block in blocks for shard in self.order.shards_of(block)))

    def _fetch(self, shard: int, generation: int) -> None:
        if generation != self._generation or self.cache.path(shard).exists():
            return
        try:
            self.cache.fetch(shard, spare_recent=True)
        except (OSError, ValueError) as error:
            # Whoever needs the shard tries again and fails with the same error.
            log.warning("%s cannot be fetched ahead: %s", self.cache.shards[shard].name, error)


class NoPrefetch:
    """For shards that are here."""

    def advance(self, positions: np.ndarray) -> None: ...

    def close(self) -> None: ...
