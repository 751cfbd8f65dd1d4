"""The index: what it finds, and what it says when something is wrong."""

import json
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from simmim_scale.data.shards import (
    INDEX_NAME,
    NOTES,
    ROW,
    TABLE_NAME,
    DamageError,
    ShardIndex,
    atomic_file,
    read_document,
    split_member,
)
from simmim_scale.data.stream import ShardReader


def edit_document(index, **changes):
    """Changes entries, as in an index without a checksum of its own: those of older versions."""
    path = index.directory / INDEX_NAME
    document = json.loads(path.read_text()) | changes
    del document["sha256"]
    path.write_text(json.dumps(document))


def test_a_loaded_index_finds_every_sample(make_shards, make_picture, make_file):
    images = [make_file(make_picture(sample)) for sample in range(10)]
    index = make_shards(images, per_shard=4, labels=[sample % 3 for sample in range(10)])
    assert len(index) == 10
    assert [shard.samples for shard in index.shards] == [4, 4, 2]
    assert index.classes == ("class 0", "class 1", "class 2")
    assert [index.locate(sample).shard for sample in range(10)] == [0] * 4 + [1] * 4 + [2] * 2
    for sample, image in enumerate(images):
        members = index.read_members(sample)
        assert members["jpg"] == image
        assert members["cls"] == str(sample % 3).encode()
        assert json.loads(members["json"]) == {"source": f"image {sample}"}
        assert index.locate(sample).label == sample % 3
        assert index.key(sample) == f"some/sample{sample:05d}"
    assert index.describe(5) == f"{index.directory}/part-00001.tar: some/sample00005"
    with pytest.raises(IndexError, match="sample 10"):
        index.locate(10)


def test_offsets_agree_with_the_tar(make_shards):
    index = make_shards(9, per_shard=5)
    for number, shard in enumerate(index.shards):
        with tarfile.open(index.directory / shard.name) as tar:
            images = [member for member in tar if member.name.endswith(".jpg")]
        where = [index.locate(sample) for sample in range(index.starts[number], index.starts[number + 1])]
        assert [(member.offset, member.offset_data, member.size) for member in images] == [
            (location.offset, location.image_offset, location.image_bytes) for location in where
        ]


def test_reader_gives_the_bytes_of_every_image_with_few_shards_open(make_shards, make_picture, make_file):
    images = [make_file(make_picture(sample)) for sample in range(12)]
    reader = ShardReader(make_shards(images, per_shard=2), max_open=2)
    views = [reader.read_image(sample) for sample in [11, 0, 5, 3, 7, 9, 1, 2, 4, 6, 8, 10]]
    # Views into shards that were let go meanwhile are still good.
    assert [bytes(view) for view in views] == [images[sample] for sample in [11, 0, 5, 3, 7, 9, 1, 2, 4, 6, 8, 10]]
    assert len(reader._open) == 2
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._open
    assert copy._limit == 2
    assert bytes(copy.read_image(4)) == images[4]
    assert reader.label(3) == -1


def test_writing_twice_gives_the_same_bytes(make_shards):
    index = make_shards(5)
    before = {path.name: path.read_bytes() for path in index.directory.iterdir()}
    index.write()
    assert {path.name: path.read_bytes() for path in index.directory.iterdir()} == before


def test_an_index_without_a_checksum_of_its_own_is_read(make_shards):
    index = make_shards(5)
    edit_document(index)
    assert len(ShardIndex.load(index.directory)) == 5


def test_pickling_sends_no_table(make_shards):
    index = make_shards(50)
    data = pickle.dumps(index)
    assert len(data) < 300
    assert np.array_equal(pickle.loads(data).table, index.table)


def test_a_file_is_complete_or_absent(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with atomic_file(path) as file:
            file.write(b"half of the new")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_members_are_split_as_webdataset_does():
    assert split_member("a.b/c.d.JPG") == ("a.b/c", "d.jpg")
    assert split_member("n01/x.jpeg") == ("n01/x", "jpeg")
    assert split_member("plain") == ("plain", "")


class TestErrors:
    """Each names the file, what was expected and what to do."""

    def test_missing_directory(self, tmp_path):
        with pytest.raises(ValueError, match=r"no such directory of shards.*data_tools shard"):
            ShardIndex.load(tmp_path / "nowhere")

    def test_no_index(self, tmp_path):
        with pytest.raises(ValueError, match=r"no index\.json and no tars.*Give the directory"):
            ShardIndex.load(tmp_path)

    def test_interrupted_sharding(self, tmp_path):
        (tmp_path / "part-00000.tar").write_bytes(b"")
        (tmp_path / NOTES).mkdir()
        with pytest.raises(ValueError, match=r"no index\.json, sharding was interrupted. Run the same"):
            ShardIndex.load(tmp_path)

    @pytest.mark.parametrize("name", [INDEX_NAME, TABLE_NAME])
    def test_a_lost_index_is_damage_that_can_be_repaired(self, make_shards, name):
        index = make_shards(3)
        (index.directory / name).unlink()
        with pytest.raises(DamageError, match=rf"python -m data_tools verify {index.directory} --repair"):
            ShardIndex.load(index.directory)

    def test_one_changed_bit_anywhere_in_the_document(self, make_shards):
        index = make_shards(3, labels=[0, 1, 2])
        path = index.directory / INDEX_NAME
        data = path.read_bytes()
        for position in range(len(data)):
            changed = bytearray(data)
            changed[position] ^= 1 << position % 8
            path.write_bytes(changed)
            with pytest.raises(DamageError, match=r"index\.json: .*--repair"):
                read_document(index.directory)

    @pytest.mark.filterwarnings("ignore:Data type alias:DeprecationWarning")
    def test_one_changed_bit_in_the_header_of_the_table(self, make_shards):
        index = make_shards(3)
        path = index.directory / TABLE_NAME
        data = path.read_bytes()
        for position in range(data.index(b"}")):
            changed = bytearray(data)
            changed[position] ^= 8
            path.write_bytes(changed)
            with pytest.raises(DamageError, match=r"--repair"):
                ShardIndex.load(index.directory)

    def test_damaged_json(self, make_shards):
        index = make_shards(3)
        (index.directory / INDEX_NAME).write_text('{"format": "simm')
        with pytest.raises(ValueError, match=r"index\.json: not valid JSON"):
            ShardIndex.load(index.directory)

    @pytest.mark.parametrize("document", ["[]", '{"format": "other"}'])
    def test_foreign_json(self, tmp_path, document):
        (tmp_path / INDEX_NAME).write_text(document)
        with pytest.raises(ValueError, match="expected the format 'simmim-shards'"):
            ShardIndex.load(tmp_path)

    def test_newer_version(self, make_shards):
        index = make_shards(3)
        edit_document(index, version=2)
        with pytest.raises(ValueError, match=r"version 2 of the format.*reads 1"):
            ShardIndex.load(index.directory)

    def test_incomplete_json(self, tmp_path):
        (tmp_path / INDEX_NAME).write_text('{"format": "simmim-shards", "version": 1, "samples": 3}')
        with pytest.raises(ValueError, match=r"'shards', 'table'.*missing"):
            ShardIndex.load(tmp_path)

    def test_empty_index(self, make_shards):
        index = make_shards(3)
        edit_document(index, samples=0, shards=[])
        with pytest.raises(ValueError, match="the index is empty"):
            ShardIndex.load(index.directory)
        empty = replace(index, shards=(), table=np.empty(0, ROW))
        with pytest.raises(ValueError, match="the index is empty"):
            empty.write()

    def test_counts_disagree(self, make_shards):
        index = make_shards(3)
        edit_document(index, samples=4)
        with pytest.raises(ValueError, match=r"disagree: 4 samples stated, 3 in the list of shards, 3 rows"):
            ShardIndex.load(index.directory)

    def test_table_of_another_run(self, make_shards):
        index = make_shards(3)
        np.save(index.directory / TABLE_NAME, np.zeros(3, ROW))
        with pytest.raises(ValueError, match=r"index\.npy: sha256 [0-9a-f]{64} is not what index\.json states"):
            ShardIndex.load(index.directory)

    def test_missing_table(self, make_shards):
        index = make_shards(3)
        (index.directory / TABLE_NAME).unlink()
        with pytest.raises(ValueError, match=r"index\.npy: missing"):
            ShardIndex.load(index.directory)

    def test_table_of_another_type(self, make_shards):
        index = make_shards(3)
        np.save(index.directory / TABLE_NAME, np.zeros(3))
        with pytest.raises(ValueError, match="expected one-dimensional rows"):
            ShardIndex.load(index.directory, check=False)

    def test_missing_shard(self, make_shards):
        index = make_shards(9, per_shard=3)
        index.shard_path(1).unlink()
        with pytest.raises(ValueError, match=r"part-00001\.tar: the index expects this shard.*missing.*Copy it again"):
            ShardIndex.load(index.directory)

    def test_truncated_shard(self, make_shards):
        index = make_shards(9, per_shard=3)
        path = index.shard_path(2)
        path.write_bytes(path.read_bytes()[:-512])
        with pytest.raises(ValueError, match=r"part-00002\.tar: the index expects.*but it has"):
            ShardIndex.load(index.directory)

    def test_shard_name_that_leaves_the_directory(self, make_shards):
        index = make_shards(3)
        edit_document(index, shards=[{"name": "../other.tar", "samples": 3, "bytes": 1, "sha256": ""}])
        with pytest.raises(ValueError, match=r"plain file name.*\.\./other"):
            ShardIndex.load(index.directory)

    def test_same_shard_twice(self, make_shards):
        index = make_shards(6, per_shard=3)
        with pytest.raises(ValueError, match="names a shard twice"):
            replace(index, shards=(index.shards[0], index.shards[0])).write()

    @pytest.mark.parametrize(("field", "value"), [("offset", 10**6), ("image_bytes", 10**6), ("label", -2)])
    def test_row_outside_its_shard(self, make_shards, field, value):
        index = make_shards(3)
        table = np.array(index.table)
        table[1][field] = value
        with pytest.raises(ValueError, match=r"row 1 .* does not fit its shard"):
            replace(index, table=table).write()

    def test_label_without_a_class(self, make_shards):
        index = make_shards(3, labels=[0, 1, 2])
        with pytest.raises(ValueError, match=r"row 2 .* class names"):
            replace(index, classes=("only", "two")).write()


def test_the_index_needs_no_torch():
    modules = "simmim_scale.data.shards, simmim_scale.data.order, simmim_scale.data.masks, simmim_scale.data.stream"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0


def test_an_index_of_many_samples_opens_by_memory_map(tmp_path):
    # The size of ImageNet-1K; the shards are sparse files.
    count, per_shard = 1_300_000, 100_000
    table = np.zeros(count, ROW)
    table["offset"] = np.tile(np.arange(per_shard, dtype=np.uint64) * 1536, count // per_shard)
    table["length"], table["image"], table["image_bytes"], table["label"] = 1536, 512, 800, -1
    shards = []
    for number in range(count // per_shard):
        path = tmp_path / f"s-{number:05d}.tar"
        with open(path, "wb") as file:
            file.truncate(per_shard * 1536)
        shards.append({"name": path.name, "samples": per_shard, "bytes": per_shard * 1536, "sha256": ""})
    np.save(tmp_path / TABLE_NAME, table)
    document = {"format": "simmim-shards", "version": 1, "samples": count, "shards": shards, "table": {"name": TABLE_NAME}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(document))
    index = ShardIndex.load(tmp_path, check=False)
    assert isinstance(index.table, np.memmap)
    where = index.locate(1_299_999)
    assert (where.shard, where.offset) == (12, 99_999 * 1536)
