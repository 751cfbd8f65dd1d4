"""Makes the pictures of this report: those of `data_tools synth` as 500x375 JPEGs with as many bytes as photographs have.

python -m data_tools synth PICTURES --images 240 --side 375 --quality 90
python benchmarks/2026-11-23-loader/pictures.py PICTURES DST --noise 9 --quality 94
python -m data_tools shard folder DST SHARDS
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--noise", type=float, default=9.0, help="standard deviation of grey levels")
    parser.add_argument("--quality", type=int, default=94)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    for path in sorted(arguments.source.rglob("*.jpg")):
        image = Image.open(path).convert("RGB")
        if image.height > image.width:
            image = image.rotate(90, expand=True)
        pixels = np.asarray(image.resize((500, 375), Image.Resampling.BICUBIC)).astype(float)
        pixels += rng.normal(0, arguments.noise, (375, 500, 1))
        out = arguments.destination / path.parent.name / path.name
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, quality=arguments.quality)


if __name__ == "__main__":
    main()
