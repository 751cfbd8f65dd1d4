"""A micro-batch in one block of shared memory, for its way from a worker to the rank.

DataLoader sends every tensor of a batch by itself, and for each of them the two processes open a connection and greet each other:
for small tensors that costs more than the copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line


@dataclass(frozen=True, slots=True)
class Part:
    """Where a tensor lies in a block: `offset` in bytes, `stride` in elements."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + prod(self.shape) * self.dtype.itemsize


class Block:
    """The tensors of a batch behind each other in memory.

    Args:
        memory: (n,) uint8.
        parts: Where each tensor lies in it.
    """

    def __init__(self, memory: Tensor, parts: Mapping[str, Part]):
        self.memory = memory
        self.parts = parts

    @classmethod
    def pack(cls, batch: Mapping[str, Tensor]) -> "Block":
        """Copies a batch into shared memory. Axes keep their order in memory, gaps between elements go."""
        parts: dict[str, Part] = {}
        end = 0
        for name, tensor in batch.items():
            dense = torch.empty_like(tensor, device="meta")
            parts[name] = Part(-(-end // ALIGNMENT) * ALIGNMENT, tensor.dtype, tuple(dense.shape), dense.stride())
            end = parts[name].end
        memory = torch.empty(0, dtype=torch.uint8)
        memory.set_(torch.UntypedStorage._new_shared(end, device="cpu"))  # what torch's own collate function calls
        block = cls(memory, parts)
        for name, tensor in block.unpack().items():
            tensor.copy_(batch[name])
        return block

    def unpack(self) -> dict[str, Tensor]:
        """The batch as views; the memory lives as long as any of them."""
        return {
            name: self.memory[part.offset : part.end].view(part.dtype).as_strided(part.shape, part.stride)
            for name, part in self.parts.items()
        }

    def pin_memory(self) -> "Block":
        """The same in page-locked memory. DataLoader calls this."""
        return Block(self.memory.pin_memory(), self.parts)
