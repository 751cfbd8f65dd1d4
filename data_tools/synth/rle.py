"""Boxes and run-length codes of masks, as COCO defines them."""

import numpy as np


def encode(mask: np.ndarray) -> list[int]:
    """Uncompressed COCO counts of an (h, w) bool mask: lengths of runs, column by column, starting with the zeros."""
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0)) if len(flat) else np.zeros(0, np.int64)
    return np.diff(changes, prepend=0, append=len(flat)).tolist()


def decode(counts: list[int], height: int, width: int) -> np.ndarray:
    """The (h, w) bool mask of `encode`.

    Raises:
        ValueError: The counts do not add up to height * width.
    """
    if sum(counts) != height * width:
        raise ValueError(f"run lengths: expected a sum of {height * width} for {height}x{width} pixels, got {sum(counts)}.")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(height, width, order="F")


def unpack(text: str) -> list[int]:
    """The counts of a compressed RLE: numbers of 5 bits a character, lowest first, from the fourth on less the last but one.

    Source: rleFrString of COCO's maskApi.c.

    Raises:
        ValueError: No compressed RLE.
    """
    counts: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is no character of one")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more of this number follows
            continue
        if bits & 16:  # negative, in two's complement
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    if shift:
        raise ValueError("it ends inside a number")
    return counts


def box(mask: np.ndarray) -> list[int]:
    """[x, y, width, height] of the smallest box around a mask that has at least one pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
