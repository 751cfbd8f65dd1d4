"""Colours in linear light, and palettes whose colours go together."""

import colorsys

import numpy as np

GAMMA = 2.2  # a screen value to this power is linear light, as nearly as a camera's processing keeps it

Colour = np.ndarray  # (3,) float32, linear light, about 0 to 1


def linear(red: float, green: float, blue: float) -> Colour:
    """A colour given by screen values between 0 and 1."""
    return np.float32([red, green, blue]) ** np.float32(GAMMA)


def from_hsv(hue: float, saturation: float, value: float) -> Colour:
    """A colour given by hue (wraps at 1), saturation and value, each between 0 and 1."""
    return linear(*colorsys.hsv_to_rgb(hue % 1.0, float(np.clip(saturation, 0, 1)), float(np.clip(value, 0, 1))))


def vary(rng: np.random.Generator, colour: Colour, amount: float) -> Colour:
    """`colour`, lighter or darker and tinted by up to about `amount` (a share)."""
    return np.clip(colour * (1 + amount * rng.uniform(-1, 1)) * (1 + 0.4 * amount * rng.uniform(-1, 1, 3)), 0.003, 1).astype(
        np.float32
    )


def sample_palette(rng: np.random.Generator) -> tuple[Colour, Colour, Colour]:
    """Three colours that differ in lightness: a strong one, a partner of it, and an accent."""
    hue, saturation, value = rng.uniform(), rng.uniform(0.35, 0.82), rng.uniform(0.42, 0.88)
    strong = from_hsv(hue, saturation, value)
    partner = (
        from_hsv(hue + 0.05, 0.1 * saturation, rng.uniform(0.85, 0.97)),  # off-white
        from_hsv(hue, saturation, value * 0.4),  # a shade of the same hue
        from_hsv(hue + 0.5 + rng.uniform(-0.1, 0.1), saturation, 0.95 - 0.5 * value),  # the opposite hue
        from_hsv(hue + rng.choice([-0.12, 0.12]), saturation * 0.8, min(1.0, value + 0.3) if value < 0.65 else value - 0.35),
        from_hsv(hue, 0.2, 0.12),  # nearly black
    )[rng.choice(5, p=[0.35, 0.15, 0.15, 0.2, 0.15])]
    accent = from_hsv(hue + rng.choice([0.33, 0.5, 0.67]), rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.95))
    return strong, partner, accent
