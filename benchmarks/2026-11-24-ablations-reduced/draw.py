"""Validation loss over AvgDist of the reduced figure 1, as shares of each run's guess: python draw.py RUNS"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

MARKS = {"random-4": "o", "random-8": "s", "random-16": "^", "random-32": "D", "block-16": "P", "square-16": "X"}

figure = Figure(figsize=(6.4, 3.6), layout="constrained")
axes = figure.add_subplot()
for name, mark in MARKS.items():
    points = []
    for run in sorted(Path(sys.argv[1]).glob(f"{name}-px_*/pretrain/metrics.jsonl")):
        last = [record for record in map(json.loads, run.read_text().splitlines()) if "val_loss" in record][-1]
        points.append((last["avg_dist"], last["val_loss"] / last["val_baseline"]))
    axes.plot(*zip(*sorted(points), strict=True), marker=mark, markersize=5, linewidth=1, label=name.replace("-", " ") + " px")
axes.set(xlabel="AvgDist, pixels of 96", ylabel="validation loss / loss of a guess", xlim=(0, None), ylim=(0, 1))
axes.legend(frameon=False, ncols=2, title="cells, ratios .2 .4 .6 .8")
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).with_name("figure1.png"), dpi=130)
