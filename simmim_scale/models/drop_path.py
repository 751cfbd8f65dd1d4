"""Stochastic depth as an argument: scales of residual branches, drawn by a counter-based hash of (seed, position, branch).

Letters: b batch, r residual branches (two per block).
"""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LOW_64 = (1 << 64) - 1


def drop_path_rates(rate: float, blocks: int) -> tuple[float, ...]:
    """Rate of each residual branch: 0 for the first block, growing linearly to `rate` for the last; two branches per block."""
    steps = max(blocks - 1, 1)
    return tuple(rate * (branch // 2) / steps for branch in range(2 * blocks))


def sample_drop_path(rates: Sequence[float], seed: int, position: Int[Tensor, "b"]) -> Float[Tensor, "r b"]:
    """Scales of the branches for samples at these positions of the stream: 0 (dropped) or 1 / (1 - rate), fp32.

    A pure function: no generator is read, and every device, world size and batch composition gives a sample the same scales.

    Args:
        rates: probability that a branch is dropped, in [0, 1).
        seed: of the run.
        position: index of each sample in the endless stream, int64; the result is on its device.
    """
    if not all(0.0 <= rate < 1.0 for rate in rates):
        raise ValueError(f"drop path: rates must lie in [0, 1), got {list(rates)}. Lower model.drop_path.")
    device = position.device
    branch = torch.arange(len(rates), dtype=torch.int64, device=device)[:, None]
    key = _mix(position.to(torch.int64) ^ _signed(_mix_int(seed)))
    bits = _mix(key[None, :] + (branch + 1) * _signed(0x9E3779B97F4A7C15))
    uniform = _shift_right(bits, 40).to(torch.float32) * 2.0**-24  # 24 bits: every value is an exact fp32 number in [0, 1)
    rate = _column(tuple(rates), device)
    return (uniform >= rate).to(torch.float32) / (1.0 - rate)


def draw_drop_path(rates: Sequence[float], batch: int, like: Tensor) -> Float[Tensor, "r b"]:
    """Scales as in `sample_drop_path`, drawn from torch's generator of `like`'s device, for callers without positions."""
    rate = _column(tuple(rates), like.device)
    uniform = torch.rand(len(rates), batch, dtype=torch.float32, device=like.device)
    return (uniform >= rate).to(torch.float32) / (1.0 - rate)


@functools.lru_cache(maxsize=64)  # a copy from the host makes it wait for the device: once per model, not once per step
def _column(rates: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(rates, dtype=torch.float32, device=device)[:, None]


def add_branch(x: Float[Tensor, "b h w c"], branch: Float[Tensor, "b h w c"], scale: Tensor | None) -> Float[Tensor, "b h w c"]:
    """x + scale * branch, `scale` (b,) or None for 1."""
    return x + branch if scale is None else torch.addcmul(x, branch, scale.to(branch.dtype)[:, None, None, None])


# splitmix64's finaliser (Steele, Lea and Flood 2014) in int64, whose products wrap in torch as they do in hardware.
def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift copies the sign; this one brings in zeros


def _mix_int(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _LOW_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _LOW_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _LOW_64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value
