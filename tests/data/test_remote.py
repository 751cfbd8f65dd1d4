"""Shards at URLs: read through local servers, HTTP, S3 and GCS, that cut connections, stall, corrupt and refuse on purpose."""

import logging
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time

import boto3
import numpy as np
import pytest
import torch
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

from simmim_scale.config.schema import DataConfig, MaskConfig, RemoteConfig
from simmim_scale.data import cache as cache_module
from simmim_scale.data import remote as remote_module
from simmim_scale.data.loader import build_training_loader
from simmim_scale.data.order import SampleOrder
from simmim_scale.data.prefetch import ShardPrefetcher
from simmim_scale.data.remote import RemoteDirectory, RemoteError, is_remote
from simmim_scale.data.remote_index import open_index
from simmim_scale.data.stream import ShardReader
from tests.data.faulty_server import STALL, FaultyServer

SAMPLES, PER_SHARD = 36, 4


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def local(make_shards):
    return make_shards(SAMPLES, name="train", per_shard=PER_SHARD)


@pytest.fixture
def http(local):
    with FaultyServer(directory=local.directory.parent) as server:
        server.location, server.options = f"{server.url}/train", {}
        yield server


@pytest.fixture(scope="module")
def moto():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(local, moto, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=moto)
    client.create_bucket(Bucket="pictures")
    for path in local.directory.iterdir():
        client.upload_file(str(path), "pictures", f"sets/train/{path.name}")
    with FaultyServer(upstream=moto) as server:
        server.location, server.options = "s3://pictures/sets/train", {"endpoint_url": server.url}
        yield server


@pytest.fixture(scope="module")
def emulator():
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported: it asks buckets by gRPC otherwise
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="pictures")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def gs(local, emulator):
    gcsfs = pytest.importorskip("gcsfs")
    bucket = gcsfs.GCSFileSystem(token="anon", endpoint_url=emulator, skip_instance_cache=True)
    for path in local.directory.iterdir():
        bucket.pipe_file(f"pictures/sets/train/{path.name}", path.read_bytes())
    with FaultyServer(upstream=emulator) as server:
        server.location, server.options = "gs://pictures/sets/train", {"endpoint_url": server.url, "token": "anon"}
        yield server


@pytest.fixture(params=["http", "s3", "gs"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def settings(tmp_path):
    def make(server, **options):
        values = {"cache_dir": str(tmp_path / "cache"), "timeout_s": 0.7, "attempts": 4, "options": server.options}
        return RemoteConfig(**(values | options))

    return make


def cached_bytes(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.name.endswith((".tar", ".part")))


def assert_same_images(index, local, samples=range(SAMPLES)):
    here, there = ShardReader(local), ShardReader(index)
    for sample in samples:
        assert bytes(there.read_image(sample)) == bytes(here.read_image(sample))


def test_what_is_a_url():
    assert all(is_remote(url) for url in ("s3://b/train", "https://host/x", "hf://datasets/o/n", "GS://b"))
    assert not any(is_remote(path) for path in ("data/train", "/data/s3:/x", "C:\\data", ""))


def test_every_sample_arrives(server, local, settings):
    index = open_index(server.location, settings(server))
    assert len(index) == SAMPLES
    assert_same_images(index, local)
    assert index.describe(5) == f"{index.shard_path(1)}: some/sample00005"
    # A second start finds everything here.
    server.requests.clear()
    assert_same_images(open_index(server.location, settings(server)), local)
    assert set(server.requests) == {"index.json"}


@pytest.mark.parametrize("fault", ["cut", "stall", "corrupt", "busy", "short"])
def test_every_fault_is_survived(server, local, settings, fault, caplog):
    index = open_index(server.location, settings(server))
    server.faults = [fault, "", fault, fault]
    with caplog.at_level(logging.WARNING):
        assert_same_images(index, local, samples=(0, 7, 30))
    assert not server.faults
    if fault == "corrupt":
        assert "sha256" in caplog.text or "checksum" in caplog.text  # S3 has one of its own for small files


def test_pieces_that_arrived_are_kept(http, local, settings, monkeypatch):
    monkeypatch.setattr(remote_module, "PIECE", 2000)
    index = open_index(http.location, settings(http))
    http.faults = ["", "", "cut", "", "busy"]
    assert_same_images(index, local, samples=(0,))
    pieces = -(-index.shards[0].bytes // 2000)
    assert http.requests["part-00000.tar"] == pieces + 2


def test_a_server_without_ranges(local, settings):
    with FaultyServer(directory=local.directory.parent, ranges=False) as server:
        server.location, server.options = f"{server.url}/train", {}
        assert_same_images(open_index(server.location, settings(server)), local, samples=(0, 20))


def test_a_server_that_stays_broken_is_an_error_after_the_last_attempt(http, settings):
    index = open_index(http.location, settings(http))
    http.always = "busy"
    with pytest.raises(RemoteError, match=r"part-00000\.tar: not read after 4 attempts.*503.*Check the network"):
        ShardReader(index).read_image(0)
    assert http.requests["part-00000.tar"] == 4
    http.always = "corrupt"
    with pytest.raises(RemoteError, match=r"part-00001\.tar: sha256 was wrong 4 times.*copy it there again"):
        ShardReader(index).read_image(PER_SHARD)
    assert cached_bytes(index.directory) == 0
    http.always = ""
    ShardReader(index).read_image(0)


def test_a_file_that_is_not_there_is_not_asked_for_again(server, local, settings):
    index = open_index(server.location, settings(server))
    missing = RemoteDirectory(server.location, settings(server))
    with pytest.raises(FileNotFoundError):
        missing.read("part-99999.tar")
    assert server.requests["part-99999.tar"] <= 1
    assert len(index) == SAMPLES


def test_pauses_double(http, settings, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote_module, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(remote_module.time, "sleep", pauses.append)
    index = open_index(http.location, settings(http, attempts=9))
    http.always = "busy"
    with pytest.raises(RemoteError):
        ShardReader(index).read_image(0)
    assert len(pauses) == 8
    assert all(0.5 <= pause / min(60, 2**attempt) <= 1 for attempt, pause in enumerate(pauses))


def test_wrong_places_are_errors_of_the_user(http, settings):
    with pytest.raises(ValueError, match=r"index of the shards cannot be read \(FileNotFoundError.*Check the URL"):
        open_index(f"{http.url}/nothing", settings(http))
    with pytest.raises(ValueError, match=r"gopher://host/x: cannot be opened"):
        open_index("gopher://host/x", settings(http))
    with pytest.raises(ValueError, match=r"data\.remote\.cache_gb: 1e-06 GB do not hold the largest shard, part-0000"):
        open_index(http.location, settings(http, cache_gb=1e-6))


def test_a_changed_set_is_not_mixed_up_with_the_cached_one(http, local, settings, make_shards):
    assert_same_images(open_index(http.location, settings(http)), local, samples=(0,))
    changed = make_shards(8, name="train", per_shard=2)
    assert_same_images(open_index(http.location, settings(http)), changed, samples=(0, 3))


def test_the_cache_stays_within_its_limit(http, local, settings, caplog):
    index = open_index(http.location, settings(http, cache_gb=3.2 * local.shards[0].bytes / 1e9))
    reader = ShardReader(index)
    sizes = []
    with caplog.at_level(logging.WARNING):
        for sample in (*range(SAMPLES), *range(SAMPLES)):
            reader.read_image(sample)
            sizes.append(cached_bytes(index.cache.root))
    assert max(sizes) <= index.cache.limit
    assert max(sizes) > 2 * local.shards[0].bytes
    assert len(reader._open) <= 3  # no map keeps the space of a dropped shard
    assert caplog.text.count("is dropped and will be fetched again") == 1


def test_shards_used_long_ago_go_first(http, local, settings, monkeypatch):
    monkeypatch.setattr(cache_module, "RECENT", 0.0)
    index = open_index(http.location, settings(http, cache_gb=3.2 * local.shards[0].bytes / 1e9))
    for shard in (0, 1, 2):
        index.cache.open(shard).close()
        time.sleep(0.01)
    index.cache.touch(0)
    index.cache.open(3).close()
    assert {shard for shard in range(9) if index.cache.path(shard).exists()} == {0, 2, 3}


def read_all(index, samples):
    reader = ShardReader(index)
    for sample in samples:
        reader.read_image(sample)


def test_processes_share_downloads(http, settings):
    index = open_index(http.location, settings(http))
    workers = [multiprocessing.get_context("fork").Process(target=read_all, args=(index, range(SAMPLES))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert {count for name, count in http.requests.items() if name.endswith(".tar")} == {1}


def test_what_a_killed_download_left_makes_room(http, local, settings):
    index = open_index(http.location, settings(http, cache_gb=2.5 * local.shards[0].bytes / 1e9))
    left = index.directory / ".part-00007.tar.part"
    left.write_bytes(b"x" * 2 * local.shards[0].bytes)
    read_all(index, (0,))
    assert not left.exists()


def test_it_travels_to_another_process(http, local, settings):
    index = pickle.loads(pickle.dumps(open_index(http.location, settings(http))))
    assert_same_images(index, local, samples=(0, 35))


def loader_options(remote, workers):
    return {
        "data": DataConfig(workers=workers, prefetch=2, mixed_shards=2, remote=remote),
        "mask": MaskConfig(cell=8),
        "image_size": (16, 16),
        "in_chans": 3,
        "seed": 11,
        "global_batch": 6,
        "micro_batch": 6,
        "accumulation": 1,
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_same_batches_as_from_local_shards(server, local, settings, workers):
    remote = settings(server, cache_gb=6 * local.shards[0].bytes / 1e9)
    server.faults = ["", "cut", "", "corrupt", "stall", "", "busy"]
    index = open_index(server.location, remote)
    with (
        build_training_loader(index, **loader_options(remote, workers)) as there,
        build_training_loader(local, **loader_options(remote, 0)) as here,
    ):
        for _ in range(15):
            expected, got = next(here), next(there)
            assert all(torch.equal(expected[name], got[name]) for name in expected)
        assert cached_bytes(index.cache.root) <= index.cache.limit
    assert not server.faults
    assert not any(thread.name.startswith("shards") for thread in threading.enumerate())


def test_shards_are_fetched_before_they_are_due(http, local, settings):
    index = open_index(http.location, settings(http))
    order = SampleOrder(np.diff(index.starts), seed=3, mixed_shards=2)
    prefetch = ShardPrefetcher(index.cache, order, downloads=2)
    prefetch.advance(np.arange(4))
    blocks = order.blocks_in_play(np.arange(4))
    wanted = {s for block in blocks for each in (block, order.block_after(block)) for s in order.shards_of(each)}
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not all(index.cache.path(shard).exists() for shard in wanted):
        time.sleep(0.02)
    prefetch.close()
    assert {shard for shard in range(9) if index.cache.path(shard).exists()} == wanted
    assert len(wanted) < 9


def test_fetching_ahead_does_not_drop_what_is_in_use(http, local, settings):
    index = open_index(http.location, settings(http, cache_gb=2.2 * local.shards[0].bytes / 1e9))
    for shard in (0, 1):
        index.cache.open(shard).close()
    assert not index.cache.fetch(5, spare_recent=True)
    assert index.cache.path(0).exists()
    assert index.cache.path(1).exists()


def test_a_stall_is_longer_than_the_patience(settings, http):
    assert settings(http).timeout_s < STALL


def test_file_systems_that_block(local, settings, http):
    """hf:// and others are not asynchronous; file:// goes the same way."""
    location = f"file://{local.directory}"
    index = open_index(location, settings(http))
    assert_same_images(index, local)
    assert not index.directory.samefile(local.directory)


def test_a_call_that_blocks_is_left_behind():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        remote_module._call_in_time(lambda: time.sleep(5), 0.1)
    assert time.monotonic() - start < 3
    with pytest.raises(ZeroDivisionError):
        remote_module._call_in_time(lambda: 1 / 0, 5.0)


def test_fsspec_is_named_where_it_is_missing(settings, http, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"pip install 'simmim-scale\[cloud\]'"):
        open_index("s3://bucket/set", settings(http))


def test_a_damaged_index_is_fetched_again_or_refused(http, local, settings):
    (local.directory / "index.npy").write_bytes(b"x" * (local.directory / "index.npy").stat().st_size)
    with pytest.raises(ValueError, match=r"index\.npy: its sha256 is not what the index states"):
        open_index(http.location, settings(http))
