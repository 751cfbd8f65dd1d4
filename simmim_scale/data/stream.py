"""Reads single samples out of tar shards by memory map and offset: no tar is parsed, no byte is copied. Remote shards are
mapped in their cache.

Random access by design: the order of samples is a pure function (see `data/order.py`), and the page cache serves it.
"""

import mmap
import resource
from bisect import bisect_right
from collections import OrderedDict
from typing import BinaryIO

import numpy as np

from simmim_scale.data.remote_index import RemoteIndex
from simmim_scale.data.shards import ShardIndex


def default_max_open() -> int:
    """Shards a reader keeps open: a quarter of what the process may open (a map holds one file handle), 16 to 1024."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(1024, max(16, soft // 4)) if soft != resource.RLIM_INFINITY else 1024


class ShardReader:
    """Bytes of samples.

    Shards are opened when first read, in the process that reads; a copy sent to a worker process starts with none open.

    Args:
        index: The shards.
        max_open: Shards kept open at the same time; the one used longest ago is let go first. None: `default_max_open()`.
    """

    def __init__(self, index: ShardIndex, *, max_open: int | None = None):
        if max_open is not None and max_open < 1:
            raise ValueError(f"max_open: expected at least 1, got {max_open}.")
        self.index = index
        self.max_open = max_open
        # Plain arrays and lists: looking a row up in a `memmap` or by `searchsorted` takes several times as long.
        self._table = np.asarray(index.table)
        self._starts = index.starts.tolist()
        self._limit = max_open or default_max_open()
        self._open: OrderedDict[int, memoryview] = OrderedDict()

    def read_image(self, sample: int) -> memoryview:
        """The encoded image of a sample, as a read-only view into the shard.

        The view stays valid after its shard has been let go, since it holds the map.

        Raises:
            OSError: The shard cannot be opened any more.
        """
        if not 0 <= sample < len(self._table):
            raise IndexError(f"sample {sample} of {self.index.directory}: expected 0 to {len(self._table) - 1}.")
        offset, _, image, image_bytes, _ = self._table[sample].item()
        start = offset + image
        return self._shard(bisect_right(self._starts, sample) - 1)[start : start + image_bytes]

    def label(self, sample: int) -> int:
        """Class of a sample; `shards.NO_LABEL` where there is none."""
        return self.index.locate(sample).label

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "max_open": self.max_open}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["index"], max_open=state["max_open"])  # type: ignore[misc, arg-type]

    def _shard(self, shard: int) -> memoryview:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        with self._open_file(shard) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Images lie all over the shard: reading ahead would fetch neighbours that are needed at some other time.
        mapped.madvise(mmap.MADV_RANDOM)
        while len(self._open) >= self._limit:
            # Not closed by hand: views into it may still be in use, and the last one closes it.
            self._open.popitem(last=False)
        self._open[shard] = memoryview(mapped)
        return self._open[shard]

    def _open_file(self, shard: int) -> BinaryIO:
        if not isinstance(self.index, RemoteIndex) or self.index.cache is None:
            return open(self.index.shard_path(shard), "rb")
        file = self.index.cache.open(shard)
        for held in [held for held in self._open if not self.index.shard_path(held).exists()]:
            del self._open[held]  # the cache has dropped it, but its space is free only when no map holds it
        return file
