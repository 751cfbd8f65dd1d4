"""RGB centres of the pixels of a set of shards, by scikit-learn's mini-batch k-means: the palette of the target "clusters"."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.jobs import run_jobs
from data_tools.stats import choose, open_pixels
from simmim_scale.data.decode import DecodeError
from simmim_scale.data.shards import ShardIndex

_CHUNK = 64  # images a job
_BATCH = 1 << 14  # pixels a step of the k-means looks at


@dataclass(frozen=True, eq=False)
class Palette:
    """Centres (n, 3) fp32 in [-1, 1] (RGB / 127.5 - 1, as iGPT's), sorted by brightness; pixels they were fitted to; root mean
    squared distance of a pixel to its centre, in grey levels of 255."""

    centres: np.ndarray
    pixels: int
    distance: float


def fit_clusters(
    index: ShardIndex,
    *,
    centres: int = 512,
    images: int = 5000,
    pixels: int = 200,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Palette:
    """Fit centres to random pixels of random images.

    Args:
        centres: how many.
        images: random images to look at; 0: all.
        pixels: random pixels of each.
        progress: called with numbers of images read.

    Raises:
        ValueError: fewer colours than centres, or scikit-learn is missing.
    """
    kmeans = _kmeans()
    chosen = choose(len(index), images or len(index), seed)
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    found = []
    for chunk, part in zip(chunks, run_jobs(functools.partial(_sample, index, pixels, seed), chunks, jobs), strict=True):
        found.append(part)
        if progress:
            progress(len(chunk))
    colours = np.concatenate(found)
    distinct = len(np.unique(colours, axis=0))
    if distinct < centres:
        raise ValueError(
            f"--centres: {centres} centres need as many colours, the {len(colours):,} pixels looked at have {distinct:,}."
            " Raise --images or --pixels, or fit fewer."
        )
    values = colours.astype(np.float32) / 127.5 - 1
    model = kmeans(n_clusters=centres, batch_size=_BATCH, n_init=1, max_iter=100, random_state=seed).fit(values)
    order = np.argsort(model.cluster_centers_.sum(1), kind="stable")
    distance = float(np.sqrt(model.inertia_ / len(values)) * 127.5)
    return Palette(np.clip(model.cluster_centers_[order], -1, 1).astype(np.float32), len(values), distance)


def save_palette(palette: Palette, path: Path, *, overwrite: bool = False) -> None:
    """Write the centres as .npy, whole or not at all. Raises ValueError for another name, or a file that is there."""
    if path.suffix != ".npy":
        raise ValueError(f"--out: a file named *.npy, got {path}.")
    if path.exists() and not overwrite:
        raise ValueError(f"--out: {path} is there already. Use --overwrite, or choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb") as file:
        np.save(file, palette.centres)
    aside.replace(path)


def _sample(index: ShardIndex, pixels: int, seed: int, samples: np.ndarray) -> np.ndarray:
    """(n, 3) uint8: random pixels of every sample that decodes."""
    found = [np.empty((0, 3), dtype=np.uint8)]
    for sample in samples.tolist():
        try:
            colours = open_pixels(index, sample).reshape(-1, 3)
        except DecodeError:
            continue
        found.append(colours[np.random.default_rng((seed, sample)).integers(len(colours), size=pixels)])
    return np.concatenate(found)


def _kmeans() -> type:
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ModuleNotFoundError as error:
        raise ValueError("fit-clusters needs scikit-learn. Install it with `pip install 'simmim-scale[clusters]'`.") from error
    return MiniBatchKMeans
