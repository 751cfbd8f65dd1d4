"""When a loss that jumped counts as a spike: pure, fed with one loss a step, the same on every rank."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median


class LossSpikeError(RuntimeError):
    """Training went wrong, on all ranks alike; the message says how."""


@dataclass
class SpikeDetector:
    """Compares each loss with the median of those before it.

    Args:
        factor: a loss above this many medians is high.
        window: losses that the median is taken of; nothing is a spike before half of them are known.
        patience: so many high losses in a row are a spike. One bad batch is none: its gradient was clipped, and the next is fine.
    """

    factor: float
    window: int
    patience: int
    _calm: deque[float] = field(init=False)
    _high: int = 0

    def __post_init__(self) -> None:
        self._calm = deque(maxlen=self.window)

    @property
    def suspicious(self) -> bool:
        """Whether the last loss was high: a state saved now might be one that a spike has spoilt."""
        return self._high > 0

    def remember(self, losses: Iterable[float]) -> None:
        """Takes losses from before this start as calm ones, oldest first."""
        self._calm.extend(losses)

    def observe(self, loss: float) -> str | None:
        """What is wrong, in words, once a spike is complete; else None. Losses of skipped steps are not observed."""
        usual = median(self._calm) if 2 * len(self._calm) >= self.window else None
        if usual is None or loss <= self.factor * usual:
            self._high = 0
            self._calm.append(loss)
            return None
        self._high += 1
        if self._high < self.patience:
            return None
        return f"loss {loss:.4g} for {self._high} steps, above {self.factor:g} times the usual {usual:.4g}"
