"""Blocks that torch.compile compiles: the same losses and gradients, whole graphs, one compilation for every batch size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from simmim_scale.config.schema import EngineConfig
from simmim_scale.engine.compilation import CACHE_VARIABLE, compile_blocks, require_compiler, use_cache

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "V2": {"model": "swin_v2"},
    "V1, checkpointing": {"model": "swin", "checkpointing": "block"},
    "V2, bf16, checkpointing": {"model": "swin_v2", "checkpointing": "block", "dtype": "bfloat16"},
    "V2, reference": {"model": "swin_v2", "attention": "reference", "norm": "reference"},
    "V2, sdpa": {"model": "swin_v2", "attention": "sdpa", "norm": "compile"},
    "V2 as machine code": {"model": "swin_v2", "code": True},
}
WITHIN = {"float32": 1e-4, "bfloat16": 5e-2}


@pytest.fixture(scope="module")
def found():
    """Largest errors of all cases, by name."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.engine.compiled_blocks", json.dumps(list(CASES.values()))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return dict(zip(CASES, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_compiled_blocks_compute_the_same_for_any_batch_and_break_no_graph(found, name):
    assert found[name] <= WITHIN[CASES[name].get("dtype", "float32")]


def test_a_backbone_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"engine\.compile: 'block' needs a backbone with checkpointable_blocks"):
        compile_blocks(nn.Linear(1, 1), "block", CPU)
    assert compile_blocks(nn.Linear(1, 1), "none", CPU) == 0


def test_selective_checkpointing_of_compiled_blocks_is_refused():
    with pytest.raises(ValueError, match="a compiled block shows none"):
        EngineConfig(compile="block", activation_checkpointing="selective")


def test_no_compiler_is_said_beforehand(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler on a CPU, and found none"):
        require_compiler(CPU)


def test_what_was_compiled_outlives_a_restart_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.delenv(CACHE_VARIABLE)
    assert use_cache() == tmp_path / "simmim_scale" / "inductor"
    monkeypatch.setenv(CACHE_VARIABLE, default_cache_dir())  # as PyTorch sets it by itself
    assert use_cache() == tmp_path / "simmim_scale" / "inductor"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    assert use_cache() == tmp_path / "own"


def test_libraries_that_a_killed_process_left_are_removed(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    whole = Path(torch._C.__file__).read_bytes()
    files = {"whole": whole, "half": whole[: len(whole) // 2], "header": whole[:40], "empty": b""}
    for name, content in files.items():
        (tmp_path / "ab").mkdir(exist_ok=True)
        (tmp_path / "ab" / f"{name}.so").write_bytes(content)
        os.utime(tmp_path / "ab" / f"{name}.so", (0, 0))
    (tmp_path / "ab" / "growing.so").write_bytes(b"")
    use_cache()
    assert sorted(path.stem for path in (tmp_path / "ab").iterdir()) == ["growing", "whole"]
