"""Which samples mixup and cutmix blend, and how: a pure function of (seed, position), the same on any number of ranks.

Neighbours in the order of samples, positions 2 i and 2 i + 1, are partners; `mix_group` neighbours (128: the batch of one GPU in
the released runs) share one draw of lambda, and of the box. The loader deals classification batches in plain runs of the order
(one lane), so partners always meet in one micro-batch, whatever the ranks and the accumulation.
"""

from dataclasses import dataclass

import numpy as np

from simmim_scale.data.random import Stream, sample_rng


@dataclass(frozen=True)
class Draw:
    """How one group is mixed. `lam`: weight of the sample itself; `box`: top, left, bottom, right of what its partner covers,
    in pixels, all 0 for mixup and for no mixing (lam 1)."""

    lam: float
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True)
class Mixing:
    """Draws how groups of samples are mixed.

    Args:
        mixup, cutmix: parameters of the beta distributions; 0: off.
        probability: that a group is mixed at all.
        cutmix_share: probability of cutmix where both are on.
        group: positions that share a draw.
        image_size: height and width in pixels.
        seed: of the run.
    """

    mixup: float
    cutmix: float
    probability: float
    cutmix_share: float
    group: int
    image_size: tuple[int, int]
    seed: int

    def draw(self, group: int) -> Draw:
        """How the samples at positions [group * size, (group + 1) * size) are mixed.

        Cutmix's box and the correction of lambda by its clipped area are those of the paper's code, as in timm.
        """
        rng = sample_rng(self.seed, 0, group, Stream.MIX)
        mixes, cuts, centre = rng.random(), rng.random(), rng.random(2)
        if mixes >= self.probability or not (self.mixup or self.cutmix):
            return Draw(1.0)
        if not self.cutmix or (self.mixup and cuts >= self.cutmix_share):
            return Draw(float(rng.beta(self.mixup, self.mixup)))
        box = _box(float(rng.beta(self.cutmix, self.cutmix)), centre, self.image_size)
        area = (box[2] - box[0]) * (box[3] - box[1])
        return Draw(1.0 - area / (self.image_size[0] * self.image_size[1]), box)

    def plan(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """The entries of a micro-batch at these positions (b,): "partner" (b,) rows of the partners, "mix_lam" (b,) float32,
        "mix_box" (b, 4) int64."""
        draws = {int(group): self.draw(int(group)) for group in np.unique(positions // self.group)}
        chosen = [draws[int(group)] for group in positions // self.group]
        rows = {int(position): row for row, position in enumerate(positions)}
        missing = [int(position) for position in positions if int(position) ^ 1 not in rows]
        assert not missing, f"partners of positions {missing[:4]} are not in the micro-batch"
        return {
            "partner": np.array([rows[int(position) ^ 1] for position in positions], dtype=np.int64),
            "mix_lam": np.array([draw.lam for draw in chosen], dtype=np.float32),
            "mix_box": np.array([draw.box for draw in chosen], dtype=np.int64),
        }


def _box(lam: float, centre: np.ndarray, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box of the image's shape and a share 1 - lam of its area around a uniform centre, cut at the borders."""
    low, high = [], []
    for place, side in zip(centre, image_size, strict=True):
        length, middle = int(side * np.sqrt(1.0 - lam)), int(place * side)
        low.append(min(max(middle - length // 2, 0), side))
        high.append(min(max(middle + length // 2, 0), side))
    return low[0], low[1], high[0], high[1]
