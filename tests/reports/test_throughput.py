"""The meter, with a clock that tests set."""

import pytest

from simmim_scale.reports.throughput import Throughput, TimeLeft, device_peak_flops, training_flops_per_image


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_wait() -> None:
    clock = Clock()
    meter = Throughput(64, clock=clock)
    for _ in range(3):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        reading = meter.step()
    assert reading.images_per_second == pytest.approx(32.0)
    assert reading.data_wait == pytest.approx(0.25)
    assert reading.seconds == pytest.approx(2.0)
    assert reading.mfu is None


def test_pauses_belong_to_no_step() -> None:
    clock = Clock()
    meter = Throughput(10, clock=clock)
    clock.now += 1.0
    with meter.paused("saving"):
        clock.now += 100.0
    assert meter.step().images_per_second == pytest.approx(10.0)
    with meter.paused("saving"):
        clock.now += 50.0
    clock.now += 2.0
    assert meter.step().seconds == pytest.approx(2.0)


def test_all_of_the_time_is_accounted_for_once() -> None:
    clock = Clock()
    meter = Throughput(10, clock=clock)
    clock.now += 0.5  # before the first step
    with meter.waiting():
        clock.now += 1.0
    with meter.computing():
        clock.now += 2.0
    meter.step()
    with meter.paused("validation"):
        clock.now += 4.0
    first = meter.spent()
    assert first == pytest.approx({"data wait": 1.0, "compute": 2.0, "validation": 4.0, "saving": 0.0, "other": 0.5})
    with meter.paused("saving"):
        clock.now += 8.0
    with meter.computing():
        clock.now += 2.0
    assert meter.spent() == pytest.approx({"data wait": 0.0, "compute": 2.0, "validation": 0.0, "saving": 8.0, "other": 0.0})


def test_wait_is_counted_when_the_loader_raises() -> None:
    clock = Clock()
    meter = Throughput(10, clock=clock)

    def load() -> None:
        with meter.waiting():
            clock.now += 1.0
            next(iter(()))

    with pytest.raises(StopIteration):
        load()
    clock.now += 1.0
    assert meter.step().data_wait == pytest.approx(0.5)


def test_window_forgets_the_slow_start() -> None:
    clock = Clock()
    meter = Throughput(10, window=4, clock=clock)
    clock.now += 60.0
    meter.step()
    for _ in range(4):
        clock.now += 1.0
        reading = meter.step()
    assert reading.images_per_second == pytest.approx(10.0)


def test_mfu_counts_backward_twice() -> None:
    clock = Clock()
    # 2 images/s of 1e9 multiply-adds: 2 * 3 * 2e9 = 12e9 FLOP/s of a peak of 120e9.
    meter = Throughput(2, flops_per_image=training_flops_per_image(10**9), peak_flops=120e9, clock=clock)
    clock.now += 1.0
    assert meter.step().mfu == pytest.approx(0.1)


def test_step_without_time_is_not_a_division_by_zero() -> None:
    meter = Throughput(2, clock=Clock())
    assert meter.step().images_per_second > 0


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "fp16", 756.5),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.1),
    ],
)
def test_peaks(name: str, precision: str, tflops: float) -> None:
    assert device_peak_flops(name, precision) == pytest.approx(tflops * 1e12)


def test_unknown_device_has_no_peak() -> None:
    assert device_peak_flops("cpu, 2 threads", "fp32") is None


def test_time_left_follows_recent_steps() -> None:
    clock = Clock()
    left = TimeLeft(100, window=5, clock=clock)
    assert left.update(10) is None
    clock.now += 30.0
    assert left.update(11) == pytest.approx(89 * 30.0)
    for step in range(12, 20):
        clock.now += 2.0
        seconds = left.update(step)
    assert seconds == pytest.approx(81 * 2.0)
    assert left.update(100) == 0.0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Throughput(0)
