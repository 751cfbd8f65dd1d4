"""The image's files without a Docker engine: linters, names that must agree, and the commands in the examples."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from launch.cli import find_hosts, split
from launch.options import many_nodes
from simmim_scale.cli import exit_codes
from simmim_scale.cli.app import app
from simmim_scale.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
SCRIPTS = sorted([*DOCKER.rglob("*.sh"), *DOCKER.rglob("*.sbatch")])
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def tool(name: str) -> str:
    """A linter of the virtual environment that runs these tests."""
    return str(Path(sys.executable).with_name(name))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_the_linter(script):
    result = subprocess.run([tool("shellcheck"), "-S", "warning", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_dockerfile_passes_the_linter():
    result = subprocess.run([tool("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?((?:[^\s-]\S* )+)\S+$", DOCKERFILE, re.MULTILINE)
    files = {name for group in copied for name in group.split() if name != "."}
    assert {"docker/install/apex.sh", "constraints.txt"} <= files
    for name in files:
        assert (ROOT / name).exists(), name
        assert name.split("/")[0] in allowed, f"{name} is kept out by Dockerfile.dockerignore"
    for package in ("simmim_scale", "launch", "data_tools", "configs"):
        assert package in allowed


def test_the_base_image_has_the_cuda_version_of_torch():
    base = re.search(r"^ARG CUDA_IMAGE=nvidia/cuda:(\d+\.\d+)\.\d+$", DOCKERFILE, re.MULTILINE)
    assert base, "the base image is pinned to a full version by a build argument"
    pin = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if not torch.__version__.startswith(pin[1]) or torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} here is not the pinned {pin[1]} for CUDA")
    assert base[1] == torch.version.cuda


def test_apex_is_pinned_once():
    script = (DOCKER / "install" / "apex.sh").read_text()
    (default,) = re.findall(r"APEX_COMMIT:-([0-9a-f]{40})", script)
    assert re.search(rf"^ARG APEX_COMMIT={default}$", DOCKERFILE, re.MULTILINE)


def test_the_image_is_not_root_and_checks_itself():
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")
    (health,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    command, *options = yaml.safe_load(health)
    assert command == "simmim"
    assert CliRunner().invoke(app, [*options, "--help"]).exit_code == 0


def overrides(command: list[str]) -> tuple[str, list[str]]:
    """The configuration and the settings of a command of the examples."""
    (config,) = [word for word in command if word.endswith(".yaml")]
    after = command[command.index(config) + 1 :]
    return config, [word for word in after if "=" in word]


def test_compose_trains_a_configuration_that_loads():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    train = compose["services"]["train"]
    command = [re.sub(r"\$\{CONFIG:-(\w+)\}", r"\1", word) for word in train["command"]]
    config, settings = overrides(command)
    loaded = load_config(ROOT / config, settings)
    mounts = [volume.split("}")[-1] for volume in train["volumes"]]
    assert any(mount.startswith(":/data") for mount in mounts)
    assert loaded.data.train.startswith("/data/")
    assert loaded.run_dir.startswith("/runs/")
    assert (DOCKER / train["build"]["context"] / train["build"]["dockerfile"]).is_file()


def test_jobset_trains_a_configuration_that_loads_and_knows_the_exit_codes():
    jobset = yaml.safe_load((DOCKER / "kubernetes" / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    config, settings = overrides(command)
    assert load_config(ROOT / config, settings).run_dir.startswith("/runs/")
    nodes = next(word for word in command if word.startswith("--nnodes")).split("=")[1]
    gpus = next(word for word in command if word.startswith("--nproc-per-node")).split("=")[1]
    assert spec["completions"] == spec["parallelism"] == int(nodes)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(gpus)
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert set(rule["onExitCodes"]["values"]) == {exit_codes.USER_ERROR, exit_codes.NONFINITE}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    name = jobset["metadata"]["name"]
    assert f"--master-addr={name}-{job['name']}-0-0.{name}" in command


@pytest.mark.parametrize("name", ["swinv2_h.sbatch", "swinv2_h_venv.sbatch"])
def test_slurm_requeues_what_was_preempted(name):
    text = (DOCKER / "slurm" / name).read_text()
    assert f'"$code" -eq {exit_codes.PREEMPTED} ]; then scontrol requeue' in text
    words = shell_words(text)
    command = words[words.index("pretrain") : words.index("||")]
    settings = [setting.replace("$RUNS", "/runs").replace("$DATA", "/data") for setting in overrides(command)[1]]
    config = load_config(ROOT / overrides(command)[0], settings)
    assert (config.run_dir, config.data.train) == ("/runs/swinv2_h", "/data/train")


def test_slurm_without_containers_starts_what_our_launcher_takes(monkeypatch):
    text = (DOCKER / "slurm" / "swinv2_h_venv.sbatch").read_text()
    words = shell_words(text)
    options, command = split(words[words.index("launch") + 1 : words.index("||")])
    assert many_nodes(options)
    assert command[0] == "pretrain"
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert directives["ntasks-per-node"] == "1", "one supervisor a node, which starts the ranks"
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-4]")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", directives["gpus-per-node"])
    answer = subprocess.CompletedProcess([], 0, stdout="node1\nnode2\nnode3\nnode4\n")
    monkeypatch.setattr("launch.transport.subprocess.run", lambda *_, **__: answer)
    hosts = find_hosts(options)
    assert len(hosts) == int(directives["nodes"])
    assert sum(len(host.slots) for host in hosts) == 32


def shell_words(text: str) -> list[str]:
    return text.replace("\\\n", " ").replace("'", " ").replace('"', "").split()
