"""Saves copied to object storage (a local S3), found again when the run directory is lost."""

import json
import shutil

import boto3
import pytest
from moto.server import ThreadedMotoServer

from simmim_scale.config.schema import CheckpointConfig
from simmim_scale.engine.checkpoint import RunStateStore
from tests.engine.test_checkpoint import Alone, Engine, names


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch, tmp_path):
    """A client of an S3 with a bucket of this test's own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=endpoint)
    name = f"runs-{tmp_path.name.replace('_', '-').lower()}"[:60].rstrip("-")
    client.create_bucket(Bucket=name)
    client.bucket = name
    return client


@pytest.fixture
def make(bucket, endpoint, tmp_path):
    """make(**settings) -> a store that mirrors to that bucket."""

    def store(directory="here", **settings):
        config = CheckpointConfig(mirror=f"s3://{bucket.bucket}/my/run", mirror_options={"endpoint_url": endpoint}, **settings)
        return RunStateStore(tmp_path / directory / "checkpoints", Alone(), config)

    return store


def keys(bucket):
    return sorted(row["Key"] for row in bucket.list_objects_v2(Bucket=bucket.bucket).get("Contents", []))


FILES = ("engine.json", "manifest.json", "rank_00000.safetensors")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_arrive_whole_old_ones_go_and_a_lost_directory_is_fetched(make, bucket, tmp_path, asynchronous):
    store = make(keep=2, keep_every_steps=2, asynchronous=asynchronous)
    for step in (2, 3, 4, 5):
        store.save(Engine(step), {"position": step * 10})
    store.wait()
    assert keys(bucket) == [f"my/run/step_{step:08d}/{name}" for step in (2, 4, 5) for name in FILES]

    shutil.rmtree(tmp_path / "here")
    elsewhere = make("there")
    saved = elsewhere.newest()
    assert (saved.step, saved.client_state) == (5, {"position": 50})
    assert (saved.path / "rank_00000.safetensors").read_text() == "state of step 5"
    assert names(elsewhere) == ["latest", "step_00000005"]
    assert sorted(path.name for path in saved.path.iterdir()) == list(FILES)


def test_an_empty_mirror_is_a_new_run(make):
    assert make().newest() is None


def test_what_is_there_comes_before_the_mirror(make, bucket):
    store = make()
    store.save(Engine(1), {})
    (store.directory / "step_00000001" / "manifest.json").write_text(
        (store.directory / "step_00000001" / "manifest.json")
        .read_text()
        .replace('"client_state": {}', '"client_state": {"here": 1}')
    )
    assert store.newest().client_state == {"here": 1}


def test_a_save_without_manifest_is_not_taken_and_a_truncated_one_is_an_error(make, bucket):
    store = make()
    store.save(Engine(1), {})
    bucket.put_object(Bucket=bucket.bucket, Key="my/run/step_00000009/engine.json", Body=b"half a save")
    assert make("there").newest().step == 1
    bucket.put_object(Bucket=bucket.bucket, Key="my/run/step_00000001/rank_00000.safetensors", Body=b"cut")
    elsewhere = make("elsewhere")
    with pytest.raises(ValueError, match=r"3 bytes arrived, its manifest states 15.*null to begin anew"):
        elsewhere.newest()
    assert not list(elsewhere.directory.glob("step_*"))


def test_a_mirror_that_fails_does_not_end_the_run_but_hides_no_loss(make, bucket, caplog):
    store = make()
    bucket.delete_bucket(Bucket=bucket.bucket)
    store.save(Engine(1), {})
    assert store.newest().step == 1
    assert "step_00000001 was not copied to s3://" in caplog.text


def test_a_mirror_that_cannot_be_reached_is_an_error_at_the_start(tmp_path):
    options = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}
    config = CheckpointConfig(mirror="s3://runs/x", mirror_options={**options, "key": "k", "secret": "s"})
    with pytest.raises(ValueError, match=r"checkpoint\.mirror: s3://runs/x could not be read"):
        RunStateStore(tmp_path, Alone(), config).newest()


def test_an_unknown_kind_of_url_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.mirror: nosuch://x cannot be opened.*checkpoint\.mirror_options"):
        RunStateStore(tmp_path, Alone(), CheckpointConfig(mirror="nosuch://x"))


def test_the_manifest_goes_up_last_and_an_upload_that_loses_bytes_has_none(make, bucket, monkeypatch, caplog):
    store = make()
    mirror = store._mirror
    put, order = mirror._filesystem.put_file, []

    def lossy(source, target):
        order.append(target.rpartition("/")[2])
        put(source, target)
        if target.endswith("safetensors"):
            bucket.put_object(Bucket=bucket.bucket, Key=target.partition("/")[2], Body=b"")

    monkeypatch.setattr(mirror._filesystem, "put_file", lossy)
    store.save(Engine(1), {})
    assert "0 of 15 bytes arrived" in caplog.text
    assert mirror.names() == []
    monkeypatch.setattr(
        mirror._filesystem, "put_file", lambda source, target: (order.append(target.rpartition("/")[2]), put(source, target))
    )
    order.clear()
    store.save(Engine(2), {})
    assert order[-1] == "manifest.json"
    assert json.loads((store.directory / "step_00000002" / "manifest.json").read_text())["step"] == 2


def test_a_directory_serves_as_a_mirror_too(tmp_path):
    config = CheckpointConfig(mirror=f"file://{tmp_path}/other/disk")
    RunStateStore(tmp_path / "here", Alone(), config).save(Engine(1), {})
    assert RunStateStore(tmp_path / "there", Alone(), config).newest().step == 1
