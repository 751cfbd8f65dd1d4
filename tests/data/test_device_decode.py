"""Decoding on the device: the same samples, crops, masks and flips as by the workers, pixels that differ by rounding alone.

Without a GPU the same code runs with torchvision's CPU decoder; the tests marked `gpu` run it with nvJPEG.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from simmim_scale.config.schema import Config, DataConfig, MaskConfig
from simmim_scale.data.decode import decode_image
from simmim_scale.data.device_decode import DeviceDecoder, make_upright, plain_jpeg_size
from simmim_scale.data.loader import build_training_loader
from simmim_scale.tasks.pretrain import build

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH = 12


def save(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_orientation(pixels: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(Image.fromarray(pixels), exif=exif, quality=95)


@pytest.fixture
def index(make_shards, make_picture):
    """Every kind of file that takes one of the ways, and damage that the worker and damage that only the device sees."""
    pixels = [make_picture(sample, height=120, width=160) for sample in range(BATCH)]
    files = [save(Image.fromarray(each), quality=95) for each in pixels]
    files[1] = with_orientation(pixels[1], 6)
    files[2] = with_orientation(pixels[2], 3)
    files[3] = save(Image.fromarray(pixels[3]), "PNG")
    files[4] = save(Image.fromarray(pixels[4]).convert("CMYK"))
    files[5] = save(Image.fromarray(pixels[5]).convert("L"), quality=95)
    files[6] = save(Image.fromarray(pixels[6]), progressive=True, quality=95)
    files[7] = files[7][: len(files[7]) // 2]
    files[8] = files[8].replace(b"\xff\xdb", b"\xff\xfe")  # quantisation tables turned into comments
    return make_shards(files, name="mixed")


def load(index, *, decoder, workers=0, in_chans=3, quarantine=None, device=None, steps=2):
    with build_training_loader(
        index,
        data=DataConfig(workers=workers, prefetch=2, decoder=decoder),
        mask=MaskConfig(cell=8),
        image_size=(64, 48),
        in_chans=in_chans,
        seed=3,
        global_batch=BATCH,
        micro_batch=BATCH // 2,
        accumulation=2,
        quarantine=quarantine,
        decode_device=device,
    ) as loader:
        return [next(loader) for _ in range(2 * steps)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("in_chans", "workers"), [(3, 0), (3, 2), (1, 0)])
def test_batches_are_those_of_the_workers(index, device, in_chans, workers, tmp_path):
    expected = load(index, decoder="cpu", in_chans=in_chans, quarantine=tmp_path / "cpu")
    got = load(
        index, decoder="gpu", in_chans=in_chans, workers=workers, device=torch.device(device), quarantine=tmp_path / "device"
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {"image"}:
            assert torch.equal(ours[name].cpu(), theirs[name]), name
        assert ours["image"].device.type == device
        assert ours["image"].dtype == torch.uint8
        assert ours["image"].is_contiguous(memory_format=torch.channels_last)
        difference = (ours["image"].cpu().int() - theirs["image"].int()).abs()
        assert difference.float().mean(dim=(1, 2, 3)).max() < 1.5
    listed = [sorted(path.read_text().count("\n") for path in (tmp_path / side).iterdir()) for side in ("cpu", "device")]
    assert listed[0] == listed[1] == [2]


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_without_any_plain_jpeg(make_shards, make_picture, device):
    index = make_shards([save(Image.fromarray(make_picture(sample)), "PNG") for sample in range(BATCH)], name="png")
    expected, got = (load(index, decoder=side, device=torch.device(device), steps=1) for side in ("cpu", "gpu"))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours["image"].cpu(), theirs["image"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_make_upright(make_picture, orientation):
    data = with_orientation(make_picture(0), orientation)
    stored = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    assert np.array_equal(make_upright(stored, orientation).permute(1, 2, 0).numpy(), decode_image(data))


class TestPlainJpeg:
    def test_sizes(self, make_picture):
        image = Image.fromarray(make_picture(0, height=37, width=51))
        for options in ({}, {"progressive": True}, {"subsampling": 0}):
            assert plain_jpeg_size(save(image, **options)) == (37, 51)
        assert plain_jpeg_size(save(image.convert("L"))) == (37, 51)
        assert plain_jpeg_size(memoryview(b"x" + save(image))[1:]) == (37, 51)

    def test_what_the_worker_decodes(self, make_picture):
        image = Image.fromarray(make_picture(0))
        whole = save(image)
        others = [
            save(image, "PNG"),
            save(image.convert("CMYK")),
            whole[:-2],
            whole[:200],
            b"",
            b"\xff\xd8\xff\xd9",
            whole + b"\0",
        ]
        others += [save(image, keep_rgb=True), whole.replace(b"\xff\xc0", b"\xff\xc9")]
        assert [plain_jpeg_size(data) for data in others] == [None] * len(others)

    def test_random_damage(self, make_picture):
        rng = np.random.default_rng(0)
        whole = save(Image.fromarray(make_picture(0)))
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(3):
                data[rng.integers(min(700, len(data)))] = rng.integers(256)
            size = plain_jpeg_size(bytes(data))
            assert size is None or min(size) >= 0


def test_what_cannot_be_done_is_an_error_of_the_user(monkeypatch):
    sizes = {"image_size": (32, 32), "interpolation": "bilinear"}
    with pytest.raises(ValueError, match=r"data\.decoder: gpu decodes to 1 or 3 channels, model\.in_chans is 5"):
        DeviceDecoder(torch.device("cpu"), in_chans=5, **sizes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"data\.decoder: gpu needs a CUDA device, there is none\. Set data\.decoder=cpu"):
        DeviceDecoder(torch.device("cuda"), in_chans=3, **sizes)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        build(Config(data=DataConfig(decoder="gpu", train="anywhere")))

    def refuse(*arguments, **options):
        raise RuntimeError("not compiled with nvJPEG")

    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    with pytest.raises(ValueError, match=r"cannot decode JPEGs on cpu \(not compiled with nvJPEG\)"):
        DeviceDecoder(torch.device("cpu"), in_chans=3, **sizes)
