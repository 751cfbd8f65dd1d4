"""Counts what makes the host of a GPU wait: reading a number, a result whose size is data, a constant copied from the host."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# aten operator -> why a GPU's host waits for it. On a CPU they are free, but the same calls are made.
WAITING = {
    "_local_scalar_dense": "item(), float(), bool() of a tensor",
    "is_nonzero": "a tensor in an if",
    "equal": "torch.equal",
    "nonzero": "the size of the result is data",
    "masked_select": "the size of the result is data",
    "unique_dim": "the size of the result is data",
    "_unique2": "the size of the result is data",
    "repeat_interleave": "the size of the result is data",
    "bincount": "the size of the result is data",
    "lift_fresh": "torch.tensor(...): a copy from pageable memory",
}


class HostReads(TorchDispatchMode):
    """While active, `found` counts the operators of WAITING by name, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING:
            self.found[name] += 1
        if name == "index" and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            self.found["index by a mask"] += 1
        return func(*args, **(kwargs or {}))
