"""Facts about the machine and the code."""

import subprocess
from pathlib import Path

import torch

from simmim_scale.reports.environment import describe_device, describe_machine, git_version, package_versions, peak_memory_bytes


def test_versions_name_what_is_installed_only() -> None:
    versions = package_versions(("torch", "no-such-package-here"))
    assert set(versions) == {"python", "torch"}
    assert versions["torch"] in torch.__version__


def test_git_version_tells_changes(tmp_path: Path) -> None:
    assert git_version(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = git_version(tmp_path)
    assert clean
    assert "dirty" not in clean
    (tmp_path / "file").write_text("2")
    assert git_version(tmp_path) == f"{clean}-dirty"


def test_device_machine_and_memory() -> None:
    cpu = torch.device("cpu")
    assert describe_device(cpu).startswith("cpu, ")
    assert int(describe_machine()["cores"]) >= 1
    assert "GiB" in describe_machine()["memory"]
    assert peak_memory_bytes(cpu) > 2**20
