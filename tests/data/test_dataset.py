"""Micro-batches: views, replacement of damaged images by a pure rule, the list of them."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simmim_scale.config.schema import DataConfig, MaskConfig
from simmim_scale.data.dataset import MAX_REPLACEMENTS, BatchRequest, ShardDataset, UndecodableSetError, replacements, stack
from simmim_scale.data.quarantine import DamagedSample, Quarantine
from simmim_scale.data.stream import ShardReader
from simmim_scale.data.views import PretrainingView, ValidationView

SECTIONS = {"data": DataConfig(), "mask": MaskConfig(cell=8), "image_size": (32, 24), "seed": 3}


def request(samples, *, epoch=0):
    ids = np.array(samples, dtype=np.int64)
    return BatchRequest(positions=ids + 100, epochs=np.full_like(ids, epoch), samples=ids, valid=np.ones(len(ids), dtype=bool))


def dataset(index, **options):
    return ShardDataset(ShardReader(index), PretrainingView(**SECTIONS), **({"in_chans": 3, "seed": 3} | options))


def test_a_batch_has_every_entry_of_the_contract(make_shards):
    batch, damaged = dataset(make_shards(5)).__getitems__(request([4, 0, 2]))
    assert {name: (tuple(entry.shape), entry.dtype) for name, entry in batch.items()} == {
        "image": ((3, 3, 32, 24), torch.uint8),
        "mask": ((3, 4, 3), torch.bool),
        "flip": ((3,), torch.bool),
        "sample": ((3,), torch.int64),
        "position": ((3,), torch.int64),
        "valid": ((3,), torch.bool),
    }
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["sample"].tolist() == [4, 0, 2]
    assert batch["position"].tolist() == [104, 100, 102]
    assert batch["valid"].all()
    assert batch["mask"].sum(dim=(1, 2)).tolist() == [8, 8, 8]  # ceil(12 * .6)
    assert damaged == []


def test_one_channel(make_shards):
    batch, _ = dataset(make_shards(2), in_chans=1).__getitems__(request([0, 1]))
    assert batch["image"].shape == (2, 1, 32, 24)


def test_draws_depend_on_seed_epoch_and_sample_alone(make_shards):
    index = make_shards(6)

    def rows(samples, *, epoch=0, seed=3):
        view = PretrainingView(**(SECTIONS | {"seed": seed}))
        batch, _ = ShardDataset(ShardReader(index), view, in_chans=3, seed=seed).__getitems__(request(samples, epoch=epoch))
        return {sample: [entry[i] for entry in batch.values()] for i, sample in enumerate(samples)}

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    alone, among_others = rows([3]), rows([5, 3, 0, 1])
    assert equal(alone[3], among_others[3])
    assert not equal(alone[3], rows([3], epoch=1)[3])
    assert not equal(alone[3], rows([3], seed=4)[3])


def test_half_of_the_images_are_flipped_and_none_on_request(make_shards):
    index = make_shards(1)

    def flips(probability):
        view = PretrainingView(**(SECTIONS | {"data": DataConfig(flip=probability)}))
        image = np.zeros((8, 8, 3), dtype=np.uint8)
        return np.mean([view(image, view.draw(epoch=epoch, sample=0))["flip"] for epoch in range(400)])

    assert len(index) == 1
    assert flips(0.0) == 0
    assert flips(1.0) == 1
    assert 0.42 < flips(0.5) < 0.58


def test_validation_views_do_not_change_between_epochs_and_show_the_centre(make_shards, make_picture):
    view = ValidationView(**SECTIONS)
    picture = make_picture(0, height=64, width=80)

    def shown(epoch, sample):
        return view(picture, view.draw(epoch=epoch, sample=sample))

    first, later = shown(0, 7), shown(5, 7)
    assert torch.equal(first["image"], later["image"])
    assert np.array_equal(first["mask"], later["mask"])
    assert not np.array_equal(first["mask"], shown(0, 8)["mask"])
    # 64x80 to 32x24: the middle 48 columns, halved.
    half = picture[:, 16:64].reshape(32, 2, 24, 2, 3).mean(axis=(1, 3))
    assert np.abs(first["image"].permute(1, 2, 0).numpy() - half).mean() < 3


@given(num=st.integers(1, 300), seed=st.integers(0, 50), data=st.data())
def test_replacements_visit_samples_at_most_once(num, seed, data):
    sample = data.draw(st.integers(0, num - 1))
    tried = list(replacements(sample, num, seed=seed))
    assert tried[0] == sample
    assert len(set(tried)) == len(tried) == min(num, MAX_REPLACEMENTS)
    assert all(0 <= each < num for each in tried)
    assert tried == list(replacements(sample, num, seed=seed))


def test_replacements_spread_over_the_set():
    seconds = {list(replacements(sample, 1000, seed=0))[1] for sample in range(200)}
    assert len(seconds) > 150


@pytest.fixture
def damaged_index(make_shards, make_picture, make_file):
    images = [make_file(make_picture(sample)) for sample in range(8)]
    images[2] = images[2][: len(images[2]) // 2]
    images[5] = b"no image"
    return make_shards(images, per_shard=3)


def test_a_damaged_image_is_replaced_and_named(damaged_index):
    batch, damaged = dataset(damaged_index).__getitems__(request([1, 2, 5]))
    expected = [next(s for s in replacements(sample, 8, seed=3) if s not in (2, 5)) for sample in (1, 2, 5)]
    assert batch["sample"].tolist() == expected
    assert batch["valid"].all()
    assert {entry.sample for entry in damaged} == {2, 5}
    entry = next(entry for entry in damaged if entry.sample == 5)
    assert entry.name == damaged_index.describe(5)
    assert entry.replacement in expected
    assert "no known image format" in entry.cause
    # The draws stay those of the sample that was ordered.
    whole, _ = dataset(damaged_index).__getitems__(request([2]))
    view = PretrainingView(**SECTIONS)
    drawn = view(np.zeros((40, 56, 3), dtype=np.uint8), view.draw(epoch=0, sample=2))
    assert np.array_equal(whole["mask"][0].numpy(), drawn["mask"])


def test_in_evaluation_a_replaced_row_does_not_count(damaged_index):
    batch, damaged = dataset(damaged_index, replaced_is_valid=False).__getitems__(request([1, 2, 5, 7]))
    assert batch["valid"].tolist() == [True, False, False, True]
    assert len(damaged) >= 2


def test_a_set_without_images_is_an_error_of_the_user(make_shards):
    loaded = dataset(make_shards([b"no image"] * 100)).__getitems__(request([4]))
    assert isinstance(loaded, UndecodableSetError)
    assert f"none of {MAX_REPLACEMENTS} images tried in a row decodes" in str(loaded)
    assert "part-00000.tar: some/sample00004" in str(loaded)


def test_other_errors_name_the_sample(make_shards):
    class Broken:
        def draw(self, *, epoch, sample):
            return sample

        def __call__(self, image, draws):
            raise RuntimeError("a bug in the view")

    loader = ShardDataset(ShardReader(make_shards(3)), Broken(), in_chans=3, seed=0)
    with pytest.raises(RuntimeError, match="a bug in the view") as caught:
        loader.__getitems__(request([1]))
    assert "part-00000.tar: some/sample00001" in caught.value.__notes__[0]


def test_it_travels_to_a_worker_process(make_shards):
    here = dataset(make_shards(200))
    data = pickle.dumps(here)
    assert len(data) < 5000
    there, _ = pickle.loads(data).__getitems__(request([3, 9]))
    expected, _ = here.__getitems__(request([3, 9]))
    assert all(torch.equal(there[name], expected[name]) for name in expected)


def test_stack_takes_numbers_and_arrays():
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    batch = stack([{"image": image, "label": label, "box": np.full(4, label, dtype=np.float32)} for label in (3, 4)])
    assert batch["label"].tolist() == [3, 4]
    assert batch["box"].tolist() == [[3.0] * 4, [4.0] * 4]


class TestQuarantine:
    def entry(self, sample):
        return DamagedSample(sample=sample, name=f"a.tar: {sample}", cause="truncated", replacement=9)

    def read(self, path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_each_image_is_listed_once_and_every_replacement_counted(self, tmp_path):
        quarantine = Quarantine(tmp_path / "quarantine", rank=2)
        for sample in (4, 7, 4, 4):
            quarantine.add(self.entry(sample))
        assert len(quarantine) == 2
        assert quarantine.num_replaced == 4
        entries = self.read(tmp_path / "quarantine" / "rank-00002.jsonl")
        assert entries[0] == {"sample": 4, "name": "a.tar: 4", "cause": "truncated", "replacement": 9}
        assert [entry["sample"] for entry in entries] == [4, 7]

    def test_a_resumed_run_does_not_list_again_what_any_rank_listed(self, tmp_path):
        Quarantine(tmp_path, rank=0).add(self.entry(4))
        # A killed run may leave half a line.
        with open(tmp_path / "rank-00000.jsonl", "a") as file:
            file.write('{"sample": 5, "na')
        resumed = Quarantine(tmp_path, rank=1)
        resumed.add(self.entry(4))
        resumed.add(self.entry(5))
        assert [entry["sample"] for entry in self.read(tmp_path / "rank-00001.jsonl")] == [5]

    def test_a_half_written_line_does_not_swallow_the_next(self, tmp_path):
        (tmp_path / "rank-00000.jsonl").write_text('{"sample": 5, "na')
        Quarantine(tmp_path).add(self.entry(6))
        assert self.read_last(tmp_path / "rank-00000.jsonl")["sample"] == 6

    def read_last(self, path):
        return json.loads(path.read_text().splitlines()[-1])

    def test_training_and_validation_number_their_images_separately(self, tmp_path):
        Quarantine(tmp_path).add(self.entry(4))
        validation = Quarantine(tmp_path)
        validation.add(DamagedSample(sample=4, name="b.tar: 4", cause="truncated", replacement=1))
        assert [entry["name"] for entry in self.read(tmp_path / "rank-00000.jsonl")] == ["a.tar: 4", "b.tar: 4"]

    def test_without_a_directory_images_are_only_counted(self):
        quarantine = Quarantine(None)
        quarantine.add(self.entry(1))
        assert len(quarantine) == 1

    def test_nothing_is_written_where_nothing_is_damaged(self, tmp_path):
        Quarantine(tmp_path / "quarantine")
        assert not (tmp_path / "quarantine").exists()
