"""How fast a run is: images per second, share of time waiting for data, time left, and MFU where the peak is known.

The clock is an argument, so that tests decide what time it is.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Dense matrix-product peaks in TFLOP/s without sparsity, from the vendors' data sheets: (16-bit tensor cores, fp32 without TF32).
# A name matches where it occurs in the device's name; the first match counts, so longer names come first.
DEVICE_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 75.0),
    ("H200", 989.4, 66.9),
    ("H100 PCIe", 756.5, 51.2),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.4, 66.9),
    ("A100", 311.9, 19.5),
    ("L40S", 362.1, 91.6),
    ("A40", 149.7, 37.4),
    ("A10G", 70.0, 31.2),
    ("A10", 125.0, 31.2),
    ("L4", 121.0, 30.3),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
)
FORWARD_AND_BACKWARD = (
    3  # backward costs twice the forward's products; recomputation for checkpointing is not counted (MFU, not HFU)
)
FLOPS_PER_MULTIPLY_ADD = 2


def device_peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of one device in FLOP/s for "fp32", "bf16" or "fp16"; None for a device that the table does not know."""
    for name, half, single in DEVICE_PEAKS:
        if name.lower() in device_name.lower():
            return (single if precision == "fp32" else half) * 1e12
    return None


def training_flops_per_image(multiply_adds: int) -> float:
    """FLOPs of forward and backward of one image, from the forward's multiply-adds."""
    return float(FORWARD_AND_BACKWARD * FLOPS_PER_MULTIPLY_ADD * multiply_adds)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The meter's state after a step: window averages, except `seconds`, which is the last step alone."""

    images_per_second: float
    data_wait: float
    seconds: float
    mfu: float | None


# What a run's wall-clock time is spent on. "compute" includes the host's waiting for the device and for other ranks.
SPENT = ("data wait", "compute", "validation", "saving", "other")


class Throughput:
    """Measures steps over a sliding window. Validation and saving are taken out with `paused()`.

        with meter.waiting():
            batches = next(loader)
        with meter.computing():
            engine.train_step(batches)
        reading = meter.step()
        spent = meter.spent()  # since the last time it was asked

    Args:
        images_per_step: the global batch.
        window: number of latest steps that averages run over.
        warmup: first steps that no average includes: they fill caches and wait for workers to come up.
        flops_per_image: see `training_flops_per_image`; None: no MFU.
        peak_flops: of all devices together, in FLOP/s; None: no MFU.
        clock: returns seconds, never going back.
    """

    def __init__(
        self,
        images_per_step: int,
        *,
        window: int = 20,
        warmup: int = 3,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if images_per_step < 1 or window < 1:
            raise ValueError(f"images_per_step and window: positive numbers, got {images_per_step} and {window}.")
        self._images = images_per_step
        self._clock = clock
        self._mfu_per_rate = flops_per_image / peak_flops if flops_per_image and peak_flops else None
        self._seconds: deque[float] = deque(maxlen=window)
        self._waits: deque[float] = deque(maxlen=window)
        self._warmup = warmup
        self._started = clock()
        self._waited = 0.0
        self._paused = 0.0
        self._account = dict.fromkeys(SPENT, 0.0)
        self._accounted = self._started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._waited += seconds
            self._account["data wait"] += seconds

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Time inside is a training step's."""
        start = self._clock()
        try:
            yield
        finally:
            self._account["compute"] += self._clock() - start

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Time inside belongs to no step; `what` is one of SPENT."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._paused += seconds
            self._account[what] += seconds

    def spent(self) -> dict[str, float]:
        """Seconds since the last call (the first time: since the meter was made) by SPENT; together they are all of it."""
        now = self._clock()
        found, total = self._account, now - self._accounted
        self._account, self._accounted = dict.fromkeys(SPENT, 0.0), now
        return {**found, "other": found["other"] + max(total - sum(found.values()), 0.0)}

    def step(self) -> Reading:
        """End the current step; the next one begins now."""
        now = self._clock()
        if self._warmup >= 0:  # such a step stands alone, and so does the first after them
            self._seconds.clear()
            self._waits.clear()
            self._warmup -= 1
        self._seconds.append(max(now - self._started - self._paused, 1e-9))
        self._waits.append(self._waited)
        self._started, self._waited, self._paused = now, 0.0, 0.0
        return self._reading()

    def _reading(self) -> Reading:
        total = sum(self._seconds)
        rate = self._images * len(self._seconds) / total
        return Reading(
            images_per_second=rate,
            data_wait=min(sum(self._waits) / total, 1.0),
            seconds=self._seconds[-1],
            mfu=None if self._mfu_per_rate is None else rate * self._mfu_per_rate,
        )


class TimeLeft:
    """Seconds until the last step, from the wall-clock time of recent steps (with validation and saving, which go on)."""

    def __init__(self, total_steps: int, *, window: int = 200, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total_steps
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque(maxlen=window)

    def update(self, step: int) -> float | None:
        """Note that `step` steps are done; None while fewer than two are known."""
        self._marks.append((step, self._clock()))
        (first_step, first_time), (last_step, last_time) = self._marks[0], self._marks[-1]
        if last_step <= first_step:
            return None
        return max(self._total - last_step, 0) * (last_time - first_time) / (last_step - first_step)
