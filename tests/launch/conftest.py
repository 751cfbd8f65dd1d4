"""The rig of two hosts and some shards, made once for all tests of this folder."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.rig import REPOSITORY, Rig, why_not


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    built = Rig(tmp_path_factory.mktemp("rig"))
    try:
        built.build()
        yield built
    finally:
        built.remove()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rig-shards")
    tools = [sys.executable, "-m", "data_tools"]
    subprocess.run([*tools, "synth", str(root / "images"), "--images", "32", "--jobs", "1"], cwd=REPOSITORY, check=True)
    subprocess.run([*tools, "shard", "folder", str(root / "images/images"), str(root / "train")], cwd=REPOSITORY, check=True)
    return root / "train"
