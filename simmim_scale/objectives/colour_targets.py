"""Colours as classes: equal bins of each channel, or the nearest of a set of RGB centres (the palette of iGPT).

Letters: b batch, c channels, q centres, rh rw predicted rows and columns.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from simmim_scale.objectives.class_target import ClassTarget, shares
from simmim_scale.objectives.pixels import PixelNorm
from simmim_scale.objectives.prediction import Pictures
from simmim_scale.objectives.targets import TargetContext, enlarge

COLOURS = 3
PIXELS_AT_ONCE = 1 << 16  # whose distances to all centres are held: 128 MiB for 512 centres


def build_bins(context: TargetContext) -> "Bins":
    """As the configuration says."""
    settings = context.settings
    return Bins(
        in_chans=context.in_chans,
        bins=settings.bins,
        scale=settings.downsample,
        norm=context.norm,
        logits_mib=settings.logits_mib,
    )


def build_clusters(context: TargetContext) -> "Clusters":
    """As the configuration says. Raises ValueError without a usable file of centres, or for pictures that are not RGB."""
    settings = context.settings
    if settings.centres is None:
        raise ValueError(
            "objective.centres: the target 'clusters' needs a file of RGB centres. Make one with"
            " `python -m data_tools fit-clusters SHARDS --out centres.npy`, or give the released one of iGPT."
        )
    if context.in_chans != COLOURS:
        raise ValueError(f"objective.target: 'clusters' needs RGB pictures, model.in_chans is {context.in_chans}.")
    return Clusters(
        centres=read_centres(Path(settings.centres)),
        scale=settings.downsample,
        norm=context.norm,
        logits_mib=settings.logits_mib,
    )


class Bins(ClassTarget):
    """Each channel classified by itself into equal bins: bin = floor(value / 255 * bins), 255 in the last (S table 6).

    Args:
        in_chans: channels of the image. bins: classes of each. scale: image pixels per predicted pixel and side, whose mean is
            classified. norm: of the image. logits_mib: see `ClassTarget`.
    """

    def __init__(self, *, in_chans: int, bins: int, scale: int, norm: PixelNorm, logits_mib: int) -> None:
        super().__init__(groups=in_chans, classes=bins, logits_mib=logits_mib)
        self.scale, self.norm = scale, norm

    def labels(self, pictures: Pictures) -> Int[Tensor, "b c rh rw"]:
        """Bins of every channel."""
        values = shares(pictures, self.norm.constants(pictures.image.device), self.scale)
        return (values * self.classes.count).floor().clamp(0, self.classes.count - 1).short()

    def to_pixels(self, summary: Int[Tensor, "b c rh rw"], pictures: Pictures) -> Float[Tensor, "b c h w"]:
        """The middle of each bin."""
        mean, std = self.norm.constants(summary.device)
        return enlarge(((summary.float() + 0.5) / self.classes.count - mean) / std, pictures.size)


class Clusters(ClassTarget):
    """The nearest of some RGB centres (iGPT: 512 of them; S table 4 predicts 48^2).

    Args:
        centres: (q, 3) in [-1, 1], as iGPT's are: value / 127.5 - 1.
        scale: image pixels per predicted pixel and side, whose mean colour is classified.
    """

    def __init__(self, *, centres: np.ndarray, scale: int, norm: PixelNorm, logits_mib: int) -> None:
        super().__init__(groups=1, classes=len(centres), logits_mib=logits_mib)
        self.scale, self.norm, self.centres = scale, norm, centres
        self._on_device: dict[torch.device, Tensor] = {}

    def labels(self, pictures: Pictures) -> Int[Tensor, "b 1 rh rw"]:
        """Numbers of the nearest centres; of two that are equally near, the first."""
        colours = (shares(pictures, self.norm.constants(pictures.image.device), self.scale) * 2 - 1).float()
        b, _, rows, columns = colours.shape
        centres = self._palette(colours.device)
        flat = colours.permute(0, 2, 3, 1).reshape(-1, COLOURS)
        # Differences, not the expanded square: that cancels where two centres are nearly as near.
        nearest = [
            torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
            for part in flat.split(PIXELS_AT_ONCE)
        ]
        return torch.cat(nearest).view(b, 1, rows, columns).short()

    def to_pixels(self, summary: Int[Tensor, "b 1 rh rw"], pictures: Pictures) -> Float[Tensor, "b 3 h w"]:
        """The centres' colours."""
        mean, std = self.norm.constants(summary.device)
        colours = self._palette(summary.device)[summary[:, 0].long()].permute(0, 3, 1, 2)
        return enlarge(((colours + 1) / 2 - mean) / std, pictures.size)

    def _palette(self, device: torch.device) -> Float[Tensor, "q 3"]:
        if device not in self._on_device:
            with torch.inference_mode(False):
                self._on_device[device] = torch.from_numpy(self.centres).to(device)
        return self._on_device[device]


def read_centres(path: Path) -> np.ndarray:
    """(q, 3) fp32 RGB centres in [-1, 1] from a .npy file: of `fit-clusters`, or the released one of iGPT.

    Raises:
        ValueError: no such file, or anything else in it.
    """
    try:
        centres = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"objective.centres: cannot read {path} ({error}). Give a .npy file of RGB centres.") from error
    if centres.ndim != 2 or centres.shape[1] != COLOURS or not 2 <= len(centres) <= np.iinfo(np.int16).max:
        raise ValueError(
            f"objective.centres: {path} holds an array of shape {centres.shape}, expected (centres, {COLOURS})."
            " Make one with `python -m data_tools fit-clusters`."
        )
    centres = np.ascontiguousarray(centres, dtype=np.float32)
    if not np.isfinite(centres).all() or np.abs(centres).max() > 1:
        raise ValueError(
            f"objective.centres: {path} holds values outside of [-1, 1]. Centres are RGB / 127.5 - 1, as iGPT's are."
        )
    return centres
