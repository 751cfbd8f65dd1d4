"""Shards at hf://, through the real file system of huggingface_hub and a local server that answers like the hub."""

import pytest

from simmim_scale.config.schema import RemoteConfig
from simmim_scale.data import remote as remote_module
from simmim_scale.data.remote_index import open_index
from simmim_scale.data.stream import ShardReader
from tests.data.fake_hub import FakeHub

hub_constants = pytest.importorskip("huggingface_hub.constants")


def test_shards_on_the_hub(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote_module, "PIECE", 2000)
    monkeypatch.setattr(remote_module, "FIRST_PAUSE", 0.01)
    local = make_shards(12, name="train", per_shard=4)
    with FakeHub(local.directory.parent, "someone/pictures") as hub:
        options = {"endpoint": hub.url, "token": False}
        remote = RemoteConfig(cache_dir=str(tmp_path / "cache"), timeout_s=20, attempts=2, options=options)
        index = open_index("hf://datasets/someone/pictures/train", remote)
        assert len(index) == 12
        ours, theirs = ShardReader(index), ShardReader(local)
        assert all(ours.read_image(sample) == theirs.read_image(sample) for sample in range(12))
        tars = [call for call in hub.seen if call.startswith("GET") and call.endswith(".tar")]
        assert len(tars) >= sum(-(-shard.bytes // 2000) for shard in local.shards)  # in pieces
        with pytest.raises(ValueError, match="index of the shards cannot be read"):
            open_index("hf://datasets/someone/pictures/nowhere", remote)
