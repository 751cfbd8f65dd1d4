"""Random generators as pure functions of (seed, epoch, sample), so that draws do not move with workers, ranks or resumes.

Each kind of draw has its own stream: changing how crops are drawn leaves masks as they were.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a generator is for. Numbers are part of the seeded result: never renumber, only add."""

    ORDER = 1
    VIEW = 2
    MASK = 3
    REPLACEMENT = 4
    VALIDATION_ORDER = 5
    VALIDATION_MASK = 6
    AUGMENT = 7
    MIX = 8


def sample_rng(seed: int, epoch: int, sample: int, stream: Stream) -> np.random.Generator:
    """A generator that depends on its arguments alone. For draws of a whole epoch, `sample` is 0."""
    words = (seed, int(stream), epoch, sample)
    # The same generator either way, but numpy takes 4 us longer to split Python's numbers into words of 32 bits.
    entropy = np.array(words, dtype=np.uint32) if max(words) < 2**32 else words
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


class DrawnAhead:
    """The next `count` numbers of a generator, uniform in [0, 1) and drawn at once; `random()` hands out one after the other."""

    def __init__(self, rng: np.random.Generator, count: int):
        self._next = iter(rng.random(count).tolist()).__next__

    def random(self) -> float:
        return self._next()
