"""Wrong input to `simmim finetune`: found before any work, with a message that says what to do."""

from pathlib import Path

import pytest

from tests.cli.train_many import train_many
from tests.data.conftest import encode, picture, write_shards

CASES = {
    "no labels": (["data.train={unlabelled}"], ["data.train: the shards in", "have no labels"]),
    "other classes": (["data.validation={other}"], ["names 3 classes, expected the 6 of training in the same order"]),
    "too few classes": (["classification.num_classes=4"], ["classification.num_classes: at least the 6 classes"]),
    "odd micro-batch": (["train.global_batch=10", "train.micro_batch=5"], ["train.micro_batch: even", "got 5"]),
    "unknown augmentation": (["classification.rand_augment=rand-mX"], ["expected RandAugment in timm's notation"]),
    "decoding on a GPU": (["data.decoder=gpu"], ["data.decoder: gpu does not do the augmentation"]),
    "weights that are not there": (["init_from=/nowhere/at/all"], ["/nowhere/at/all"]),
    "half a probe": (["probe.fit={shards}"], ["probe.test: both sets are needed"]),
    "task of another command": (["task=pretrain"], ["this command trains classification, got 'pretrain'"]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("finetune")
    images = [encode(picture(sample)) for sample in range(24)]
    sets = {"shards": [sample % 6 for sample in range(24)], "other": [sample % 3 for sample in range(24)], "unlabelled": None}
    places = {name: str(write_shards(root / name, images, labels=labels).directory) for name, labels in sets.items()}
    data = [f"data.train={places['shards']}", f"data.validation={places['shards']}"]
    base = [str(repository / "configs/debug/finetune.yaml"), *data, "train.global_batch=16", f"run_dir={root / 'run'}"]
    runs = {}
    for name, (settings, _) in CASES.items():
        runs[name] = [*base, *(setting.format(**places) for setting in settings)]
    return train_many(runs)


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_a_clear_error(case: str, outcomes):
    outcome = outcomes[case]
    assert outcome["code"] == 2, outcome
    assert "Traceback" not in outcome["message"]
    for word in CASES[case][1]:
        assert word in outcome["message"]
