"""Writes tensors to a safetensors file one after another, so that saving takes no second copy of them in memory.

The library's own writer wants all tensors on the CPU at once. Reading is its `safe_open`, which fetches slices.
Format: 8 bytes length of the header, little-endian; the header, JSON; the tensors' bytes (github.com/huggingface/safetensors).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

CHUNK = 2**24  # elements that leave the device at a time: 64 MB in fp32
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entry_of(name: str, tensor: Tensor) -> Entry:
    """The entry of a tensor.

    Raises:
        ValueError: a type of number that the format does not have.
    """
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: one of {', '.join(map(str, DTYPES))} can be saved, got {tensor.dtype}.")
    return Entry(name, tensor.dtype, tuple(tensor.shape))


def write_tensors(path: Path, entries: Sequence[Entry], tensors: Iterator[Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file.

    Args:
        tensors: one for each entry, in their order; each is asked for when the one before is written.
    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with path.open("wb") as file:
        file.write(_header(entries, metadata))
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), f"{entry.name} changed while it was saved"
            _write(file, tensor)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _write(file: IO[bytes], tensor: Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK].to("cpu").contiguous()
        file.write(memoryview(chunk.view(torch.uint8).numpy()))
