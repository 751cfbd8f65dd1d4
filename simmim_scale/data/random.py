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
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(stream), epoch, sample))))
