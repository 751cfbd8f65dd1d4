"""What `simmim doctor` tries out: each op's chosen implementation against its reference, a JPEG, two steps of training."""

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from simmim_scale.cli.doctor import Row, Wanted
from simmim_scale.config.engine import EngineConfig
from simmim_scale.config.model import SwinV2Config
from simmim_scale.config.objective import ObjectiveConfig
from simmim_scale.config.optimization import OptimizerConfig
from simmim_scale.config.section import IMAGENET_MEAN, IMAGENET_STD

# Largest difference between two correct computations in fp32 with sums of a few hundred terms.
AGREES = 1e-4
SIDE = 64  # pixels of the toy pictures
BATCH = 8


def check_jpeg(_: Wanted) -> Iterator[Row]:
    """A picture goes through the fast decoder and comes back as it was, within JPEG's loss."""
    from PIL import Image

    from simmim_scale.data.decode import decode_image

    ramp = np.linspace(0, 255, SIDE, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(128)), -1)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    decoded = decode_image(file.getvalue())
    error = float(np.abs(np.asarray(decoded, dtype=float) - picture).mean())
    if error > 4:
        yield Row(
            "JPEG decoding", "fail", f"decoded picture is off by {error:.1f} of 255", "Install simplejpeg and pillow again."
        )
    else:
        yield Row("JPEG decoding", "ok", f"off by {error:.1f} of 255 on average, as JPEG is")


def check_window_attention(_: Wanted) -> Iterator[Row]:
    """The implementation that `auto` takes here, forward and backward, against the reference."""
    from simmim_scale.kernels.dispatch import choose
    from simmim_scale.kernels.window_attention import window_attention

    device = _device()
    generator = torch.Generator().manual_seed(0)
    heads, window, dim = 2, (4, 4), 32
    qkv = torch.randn(2, 8, 8, 3 * heads * dim, generator=generator).to(device)
    bias = torch.randn(heads, 16, 16, generator=generator).to(device)
    results = []
    for name in ("auto", "reference"):
        leaf = qkv.clone().requires_grad_()
        out = window_attention(leaf, bias, num_heads=heads, window=window, shift=(2, 2), implementation=name)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        results.append((out.detach(), gradient))
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in zip(*results, strict=True))
    choice = choose("window_attention", "auto", device=device, dtype=torch.float32, head_dim=dim, tokens=16)
    found = f"{choice.name} on {device.type}: off by {difference:.1e} from the reference"
    if difference < AGREES * float(results[1][1].abs().max()):
        yield Row("window attention", "ok", found)
    else:
        yield Row("window attention", "fail", found, "Set kernels.window_attention=reference, and report it.")


def check_training(_: Wanted) -> Iterator[Row]:
    """Ten steps of a toy SwinV2 under ZeRO-3, and a save: the loss must fall."""
    from simmim_scale.engine.engine import build_engine
    from simmim_scale.engine.runtime import start_runtime
    from simmim_scale.objectives.simmim import build_simmim

    runtime = start_runtime(timeout_minutes=2.0)
    engine = build_engine(
        lambda: build_simmim(
            SwinV2Config(image_size=SIDE, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4),
            ObjectiveConfig(),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            seed=0,
        ),
        engine=EngineConfig(zero_stage=3, precision="fp32"),
        optimizer=OptimizerConfig(),
        lr=lambda step: 3e-3,
        micro_batch=BATCH,
        accumulation=1,
        global_batch=BATCH,
        runtime=runtime,
    )
    try:
        losses = [engine.train_step([_toy_batch(runtime.device)]).loss for _ in range(10)]
        with tempfile.TemporaryDirectory() as folder:
            written = sum(path.stat().st_size for path in engine.snapshot().write(Path(folder)))
    finally:
        engine.destroy()
        runtime.close()
    found = f"ten steps under ZeRO-3: loss {losses[0]:.3f} to {losses[-1]:.3f}; saved {written / 1e6:.1f} MB"
    if losses[-1] < losses[0]:
        yield Row("training", "ok", found)
    else:
        yield Row("training", "fail", found, "The loss did not fall: run `make test`, and report what fails.")


CHECKS: tuple[Callable[[Wanted], Iterable[Row]], ...] = (check_jpeg, check_window_attention, check_training)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _toy_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """Stripes of one frequency, half of their cells hidden: something that ten steps can learn."""
    generator = torch.Generator().manual_seed(1)
    wave = (torch.arange(SIDE) / 4).sin().mul(100).add(128).to(torch.uint8)
    image = wave.expand(BATCH, 3, SIDE, SIDE).contiguous()
    mask = torch.rand(BATCH, 4, 4, generator=generator) < 0.5
    return {"image": image.to(device), "mask": mask.to(device)}
