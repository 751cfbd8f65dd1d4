"""Labelled batches: augmentation and mixing are functions of seed, epoch, sample and position, on any number of ranks."""

import pickle
import random

import numpy as np
import pytest
import torch

from simmim_scale.config.schema import ClassificationConfig, DataConfig
from simmim_scale.data.classification import (
    TestedView as CentreView,
)
from simmim_scale.data.classification import (
    build_augment,
    build_labelled_training_loader,
    build_labelled_validation_loader,
    build_mixing,
    class_names,
)
from simmim_scale.data.random import Stream, sample_rng

SIZE = (32, 32)
DATA = DataConfig(workers=0, crop_scale=(0.3, 1.0), interpolation="bicubic")
PUBLISHED = ClassificationConfig()


def rng(sample: int) -> np.random.Generator:
    return sample_rng(3, 0, sample, Stream.AUGMENT)


def image_of(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_augmentation_depends_on_its_generator_alone_and_leaves_global_ones_as_they_were():
    augment = build_augment(DATA, PUBLISHED, SIZE)
    views = [augment(image_of(0), rng(sample)) for sample in range(12)]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again = pickle.loads(pickle.dumps(augment))
    for sample in reversed(range(12)):
        assert torch.equal(again(image_of(0), rng(sample)), views[sample])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert len({view.numpy().tobytes() for view in views}) > 8


def test_random_erasing_fills_a_rectangle_with_normal_noise_in_a_quarter_of_the_images():
    augment = build_augment(DATA, ClassificationConfig(rand_augment=None), (64, 64))
    image = torch.full((3, 64, 64), 7, dtype=torch.uint8)
    changed = [(augment(image, rng(sample)) != 7).any(0) for sample in range(400)]
    share = np.mean([bool(mask.any()) for mask in changed])
    assert 0.18 < share < 0.32
    noise = []
    for sample, mask in enumerate(changed):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if not len(rows):
            continue
        area = int(rows.max() - rows.min() + 1) * int(columns.max() - columns.min() + 1) / 64**2
        assert 0.005 < area < 0.36  # timm: 2 % to a third
        noise.append(augment(image, rng(sample))[:, mask].float())
    values = (torch.cat(noise, dim=1) / 255 - torch.tensor(DATA.mean)[:, None]) / torch.tensor(DATA.std)[:, None]
    assert values.mean().abs() < 0.05
    assert 0.9 < values.std() < 1.0  # cut at black and white


def test_unknown_augmentation_is_refused_before_any_work():
    for name in ("rand-mX", "augmix", "rand-zz9"):
        with pytest.raises(ValueError, match=r"expected RandAugment in timm's notation, got"):
            build_augment(DATA, ClassificationConfig(rand_augment=name), SIZE)
    four = DataConfig(mean=(0.5,) * 4, std=(0.2,) * 4)
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        build_augment(four, PUBLISHED, SIZE)


def test_mixing_draws_have_the_published_distribution():
    mixing = build_mixing(PUBLISHED, (224, 224), seed=0)
    draws = [mixing.draw(group) for group in range(3000)]
    cut = [draw for draw in draws if draw.box != (0, 0, 0, 0)]
    mixed = np.array([draw.lam for draw in draws if draw.box == (0, 0, 0, 0)])
    assert 0.45 < len(cut) / len(draws) < 0.53
    generator = np.random.default_rng(0)
    expected = generator.beta(0.8, 0.8, 20000)
    assert np.abs(np.quantile(mixed, [0.1, 0.3, 0.5, 0.7, 0.9]) - np.quantile(expected, [0.1, 0.3, 0.5, 0.7, 0.9])).max() < 0.05
    for draw in cut:
        top, left, bottom, right = draw.box
        assert draw.lam == pytest.approx(1 - (bottom - top) * (right - left) / 224**2)


def step_of(index, *, rank: int, world: int, micro: int, step: int = 1, **overrides) -> dict[int, dict[str, torch.Tensor]]:
    """Position -> what one rank's loader says of it in a step of 16 samples."""
    settings = ClassificationConfig(**{"mix_group": 4, **overrides})
    loader = build_labelled_training_loader(
        index,
        data=DATA,
        classification=settings,
        image_size=SIZE,
        in_chans=3,
        seed=5,
        global_batch=16,
        micro_batch=micro,
        accumulation=16 // world // micro,
        rank=rank,
        world_size=world,
        start_position=16 * step,
    )
    found = {}
    with loader:
        for _ in range(16 // world // micro):
            batch = next(loader)
            for row, position in enumerate(batch["position"].tolist()):
                partner = int(batch["partner"][row])
                found[position] = {
                    "image": batch["image"][row],
                    "label": batch["label"][row],
                    "lam": batch["mix_lam"][row],
                    "box": batch["mix_box"][row],
                    "partner": batch["position"][partner],
                    "partner image": batch["image"][partner],
                }
    return found


def test_images_labels_partners_and_lambdas_are_the_same_on_any_number_of_ranks(make_shards):
    index = make_shards(20, labels=[sample % 3 for sample in range(20)])
    whole = step_of(index, rank=0, world=1, micro=16)
    assert sorted(whole) == list(range(16, 32))
    assert all(entry["partner"] == position ^ 1 for position, entry in whole.items())
    assert len({float(entry["lam"]) for entry in whole.values()}) == 4  # groups of 4
    for world, micro in ((1, 2), (2, 4), (4, 4), (4, 2)):
        parts = [step_of(index, rank=rank, world=world, micro=micro) for rank in range(world)]
        merged = {position: entry for part in parts for position, entry in part.items()}
        assert merged.keys() == whole.keys()
        for position, entry in merged.items():
            assert all(torch.equal(value, whole[position][name]) for name, value in entry.items()), (world, micro, position)


def test_a_label_is_that_of_the_image_which_is_shown(make_shards, make_file, make_picture):
    files = [make_file(make_picture(sample)) for sample in range(8)]
    files[3] = b"broken"
    labels = list(range(8))
    index = make_shards(files, labels=labels)
    loader = build_labelled_validation_loader(
        index, data=DATA, view=CentreView(SIZE, "bilinear", 1.0, "cover"), in_chans=3, seed=0, micro_batch=5
    )
    columns = [torch.cat([batch[name] for batch in loader]).tolist() for name in ("sample", "label", "valid")]
    rows = list(zip(*columns, strict=True))
    assert all(sample == label for sample, label, _ in rows)
    assert sum(valid for _, _, valid in rows) == 7  # neither the broken one nor the two that fill the last batch


def test_an_odd_micro_batch_cannot_be_mixed(make_shards):
    index = make_shards(20, labels=[0] * 20)
    with pytest.raises(ValueError, match=r"train.micro_batch: even where samples are mixed in pairs, got 1"):
        step_of(index, rank=0, world=1, micro=1)


def test_shards_without_labels_are_refused(make_shards):
    with pytest.raises(ValueError, match=r"data.train: the shards in .* have no labels"):
        class_names(make_shards(4), "data.train")
    with pytest.raises(ValueError, match=r"data.train: 1 of 4 samples .* have no label"):
        class_names(make_shards(4, name="some", labels=[0, 1, -1, 1]), "data.train")


@pytest.mark.parametrize(
    ("crop", "resize", "shape", "expected"),
    [
        (0.875, "cover", (256, 341), (16, 58, 224, 224)),  # the published 256 -> 224
        (1.0, "cover", (256, 341), (0, 42, 256, 256)),
        (1.0, "squash", (256, 341), (0, 0, 256, 341)),
        (0.5, "squash", (100, 200), (25, 50, 50, 100)),
    ],
)
def test_the_tested_part_of_an_image(crop, resize, shape, expected):
    part = CentreView((224, 224), "bicubic", crop, resize).part(*shape)
    assert (part.top, part.left, part.height, part.width) == expected
