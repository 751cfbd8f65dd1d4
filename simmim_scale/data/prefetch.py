"""Downloads remote shards before their samples are due, in threads of the rank's process."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from simmim_scale.data.cache import RECENT, ShardCache
from simmim_scale.data.order import LaneBlock, SampleOrder

log = logging.getLogger(__name__)


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
        self._threads: ThreadPoolExecutor | None = None
        self._generation = 0

    def advance(self, positions: np.ndarray) -> None:
        """Tells which positions the rank loads now."""
        blocks = self.order.blocks_in_play(positions)
        if blocks == self._blocks and time.monotonic() - self._touched < RECENT / 4:
            return
        self._blocks, self._touched = blocks, time.monotonic()
        now = self._shards(blocks)
        later = [shard for shard in self._shards([self.order.block_after(block) for block in blocks]) if shard not in now]
        for shard in now:
            self.cache.touch(shard)
        self._generation += 1
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.downloads, thread_name_prefix="shards")
        for shard in [*now, *later]:
            self._threads.submit(self._fetch, shard, self._generation)

    def close(self) -> None:
        """Stops; a download that is under way is finished first."""
        self._generation += 1
        threads, self._threads, self._blocks = self._threads, None, []
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)

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
