"""Whole runs of `python -m launch`: 2 ranks, ZeRO-3, killed and resumed. Losses must be the same to the last digit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

import simmim_scale
from launch.machine import free_port
from simmim_scale.cli.app import app
from simmim_scale.cli.export import read_weights
from simmim_scale.models.weights import load_weights
from simmim_scale.tasks.pretrained import as_pretrained
from tests.data.faulty_server import FaultyServer

STEPS, SAVE_EVERY = 12, 4
SETTINGS = (
    f"train.steps={STEPS}",
    "train.global_batch=8",
    "train.micro_batch=2",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "validation.every_steps=6",
    "validation.samples=10",
    "data.workers=1",
)
DEADLINE = 600  # seconds; a hang fails the test instead of the whole suite, a busy machine does not


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """DIR/train and DIR/val, made by the commands of the README."""
    root = tmp_path_factory.mktemp("shards")
    for name, count, seed in (("train", 40, 0), ("val", 12, 1)):
        images = root / f"images-{name}"
        command = [sys.executable, "-m", "data_tools"]
        subprocess.run(
            [*command, "synth", str(images), "--images", str(count), "--seed", str(seed), "--jobs", "1"],
            cwd=repository,
            check=True,
        )
        subprocess.run([*command, "shard", "folder", str(images / "images"), str(root / name)], cwd=repository, check=True)
    return root


@pytest.fixture(scope="module")
def start(shards: Path, repository: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start(run_dir, *settings, ranks=2, launch=ours) -> the launcher's process; whatever is left at the end is killed."""
    started: list[Path] = []

    def run(run_dir: Path, *settings: str, ranks: int = 2, launch: Sequence[str] = ()) -> subprocess.Popen[str]:
        started.append(run_dir)
        config = repository / "configs/debug/tiny_swinv2.yaml"
        data = (f"data.train={shards / 'train'}", f"data.validation={shards / 'val'}", f"run_dir={run_dir}")
        ours = [sys.executable, "-m", "launch", "--ranks", str(ranks), "--"]
        command = [*(launch or ours), "pretrain", str(config), *data, *SETTINGS, *settings]
        return subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    yield run
    for run_dir in started:
        kill_processes(run_dir)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    output, code = finish(start(run_dir))
    assert code == 0, output
    return run_dir


def processes(run_dir: Path) -> list[psutil.Process]:
    """Everything that has the run directory on its command line: launcher, keeper, ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run_dir) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def kill_processes(run_dir: Path) -> None:
    for process in processes(run_dir):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def finish(process: subprocess.Popen[str]) -> tuple[str, int]:
    output, _ = process.communicate(timeout=DEADLINE)
    return output, process.returncode


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, f"ended early: {finish(process)}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple]:
    """What must be the same: everything that is not a time or a size of memory."""
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "val_loss", "val_baseline")
    return [tuple(record.get(key) for key in keys) for record in records(run_dir)]


def test_an_undisturbed_run_writes_what_the_readme_promises(whole: Path):
    rows = records(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 and row["lr"] > 0 for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12]
    assert (whole / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    page = (whole / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not processes(whole)

    module = simmim_scale.load(whole)
    assert not module.training
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, :8] = True
    outputs = module({"image": torch.zeros(2, 3, 64, 64), "mask": mask})
    assert outputs["prediction"].shape == (2, 3, 64, 64)
    assert outputs["loss"].isfinite()
    assert [feature.shape[1] for feature in module.backbone.features(torch.zeros(1, 3, 64, 64))] == [16, 32, 64, 128]


@pytest.mark.parametrize(
    "launch",
    [
        ("deepspeed", "--no_local_rank", "--num_gpus", "2", "--master_port", "PORT", "--module", "simmim_scale"),
        ("torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "--module", "simmim_scale"),
    ],
    ids=lambda words: words[0],
)
def test_plain_launchers_train_the_same(
    whole: Path, start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: tuple[str, ...]
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    program = Path(sys.executable).with_name(launch[0])
    # The launchers start `python` of the environment that they are installed in.
    words = [sys.executable, str(program), *(str(free_port()) if word == "PORT" else word for word in launch[1:])]
    output, code = finish(start(tmp_path / "run", launch=words))
    assert code == 0, output
    assert losses(tmp_path / "run") == losses(whole)


def test_the_newest_save_of_a_run_that_goes_on_is_exported_key_by_key_and_in_its_forward(whole: Path, tmp_path: Path):
    going_on = tmp_path / "going_on"
    shutil.copytree(whole, going_on)
    shutil.rmtree(going_on / "weights")
    consolidated, finished = read_weights(going_on), load_weights(whole / "weights")
    assert consolidated.path.name == f"step_{STEPS:08d}"
    assert consolidated.state.keys() == finished.state.keys()
    assert all(torch.equal(consolidated.state[name], value) for name, value in finished.state.items())
    batch = {"image": torch.rand(2, 3, 64, 64), "mask": torch.rand(2, 16, 16) < 0.5}
    with torch.no_grad():
        again, before = as_pretrained(consolidated).module(batch), simmim_scale.load(whole)(batch)
    assert torch.equal(again["prediction"], before["prediction"])

    result = CliRunner().invoke(app, ["export", str(going_on), "--to", "microsoft", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert f"weights of step {STEPS}" in result.output
    assert "tensors read back differs by at most 0.0e+00" in result.output
    card = (tmp_path / "out/README.md").read_text()
    assert f"these weights are of step {STEPS}" in card
    assert "val_loss: " in card
    assert "val_loss: " in (whole / "weights/README.md").read_text()

    (going_on / f"checkpoints/step_{STEPS:08d}/manifest.json").unlink()  # not complete: the one before it is taken
    assert read_weights(going_on).extra["step"] == str(STEPS - SAVE_EVERY)
    (going_on / "config.yaml").unlink()  # no run of ours: nothing in it is read
    with pytest.raises(ValueError, match="has not written its weights"):
        read_weights(going_on)


def test_killed_at_random_and_during_a_save_then_resumed_gives_the_same_losses(whole: Path, start, tmp_path: Path):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    process = start(run_dir)
    step = rng.randrange(1, STEPS)
    wait_for(lambda: steps_done(run_dir) >= step, process)
    time.sleep(rng.uniform(0, 0.3))
    kill_processes(run_dir)
    finish(process)

    # Now kill in the middle of a save: as soon as a directory is being filled.
    if steps_done(run_dir) < STEPS - 1:
        process = start(run_dir)
        wait_for(lambda: bool(list(run_dir.glob("checkpoints/.unfinished-*/rank_*"))), process)
        kill_processes(run_dir)
        finish(process)

    output, code = finish(start(run_dir))
    assert code == 0, f"seed {seed}: {output}"
    assert losses(run_dir) == losses(whole), f"seed {seed}"


def test_sigterm_saves_exits_75_and_resumes_to_the_same_losses(whole: Path, start, tmp_path: Path):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for(lambda: steps_done(run_dir) >= 2, process)
    process.send_signal(signal.SIGTERM)
    output, code = finish(process)
    assert code == 75, output
    done = steps_done(run_dir)
    assert done < STEPS
    assert (run_dir / f"checkpoints/step_{done:08d}/manifest.json").exists()
    assert not processes(run_dir)

    # A truncated and a foreign save lie around: neither is resumed from, neither is deleted.
    truncated = run_dir / "checkpoints/step_00000999"
    truncated.mkdir()
    (truncated / "manifest.json").write_text('{"format": "simmim-run-st')
    foreign = run_dir / "checkpoints/my-notes.txt"
    foreign.write_text("keep me")
    output, code = finish(start(run_dir))
    assert code == 0, output
    assert losses(run_dir) == losses(whole)
    assert (truncated / "manifest.json").exists()
    assert foreign.read_text() == "keep me"


def test_two_ranks_then_one_then_four_go_on_with_the_samples_that_are_left(whole: Path, start, tmp_path: Path):
    run_dir = tmp_path / "run"
    for ranks, enough in ((2, 2), (1, 6), (4, STEPS)):
        process = start(run_dir, f"engine.zero_stage={1 if ranks == 1 else 3}", ranks=ranks)
        if enough < STEPS:
            wait_for(lambda enough=enough: steps_done(run_dir) >= enough, process)
            process.send_signal(signal.SIGTERM)
        output, code = finish(process)
        assert code == (75 if enough < STEPS else 0), output
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (
        "ranks 1 -> 4, ZeRO stage 1 -> 3, micro-batch x rounds 2 x 4 -> 2 x 1; the global batch stays 8"
        in (environment["plan"]["resumes"])
    )
    for found, expected in zip(losses(run_dir), losses(whole), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_run_continues_from_portable_weights(whole: Path, start, tmp_path: Path):
    run_dir = tmp_path / "run"
    output, code = finish(start(run_dir, f"init_from={whole}", "train.steps=1", "validation.every_steps=1"))
    assert code == 0, output
    before, after = records(whole)[-1]["val_loss"], records(run_dir)[0]["val_loss"]
    assert after == pytest.approx(before, rel=0.02)
    assert os.path.exists(run_dir / "weights/model.safetensors")


def test_a_server_that_fails_for_good_costs_no_step(start, shards: Path, repository: Path, tmp_path: Path):
    """The run says why, saves, and ends on both ranks; the same command goes on when the server is back."""
    sets = tmp_path / "sets"
    command = [sys.executable, "-m", "data_tools", "shard", "folder", str(shards / "images-train/images"), str(sets / "train")]
    subprocess.run([*command, "--samples-per-shard", "4"], cwd=repository, check=True)
    settings = ("validation.every_steps=12", "checkpoint.every_steps=12", "data.mixed_shards=2", "data.prefetch=1")
    run_dir = tmp_path / "run"
    with FaultyServer(directory=sets) as server:
        server.faults, server.always = [""] * 5, "busy"
        remote = (f"data.train={server.url}/train", "data.remote.attempts=2", f"data.remote.cache_dir={tmp_path / 'cache'}")
        output, code = finish(start(run_dir, *remote, *settings))
        assert code == 4, output
        assert "not read after 2 attempts" in output
        assert "Run the same command again" in output
        assert "Traceback" not in output
        done = steps_done(run_dir)
        assert 0 < done < STEPS
        assert (run_dir / f"checkpoints/step_{done:08d}/manifest.json").exists()
        assert not processes(run_dir)
        server.always = ""
        output, code = finish(start(run_dir, *remote, *settings))
        assert code == 0, output
    assert [row["step"] for row in records(run_dir)] == list(range(1, STEPS + 1))
