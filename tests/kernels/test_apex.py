"""Telling NVIDIA's Apex from other things of that name, without importing any of them."""

import importlib
import sys

import pytest

from simmim_scale.kernels import apex

BOMB = "raise RuntimeError('looking must not import')\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that Python looks into first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    yield tmp_path
    importlib.invalidate_caches()


def install(site, *, folders=(), metadata=None, modules=()):
    package = site / "apex"
    package.mkdir()
    (package / "__init__.py").write_text(BOMB)
    for folder in folders:
        (package / folder).mkdir()
        (package / folder / "__init__.py").write_text(BOMB)
    for module in modules:
        (site / f"{module}.py").write_text(BOMB)
    if metadata is not None:
        info = site / "apex-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata)
    importlib.invalidate_caches()


def test_absent_apex_names_the_source(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    assert "NVIDIA's Apex is not installed; build it from https://github.com/NVIDIA/apex" in apex.unavailable(
        "optimizers", "amp_C"
    )


def test_the_web_toolkit_of_that_name_is_recognised_and_named(site):
    described = "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: Pyramid toolkit to add Velruse\n"
    install(site, folders=("lib", "ext"), metadata=described)
    reason = apex.unavailable("normalization", "fused_layer_norm_cuda")
    assert "apex 0.9.10.dev0 (Pyramid toolkit to add Velruse) is not NVIDIA's Apex" in reason
    assert "pip uninstall apex" in reason


def test_a_stranger_without_metadata_is_still_a_stranger(site):
    (site / "apex.py").write_text(BOMB)
    importlib.invalidate_caches()
    assert "apex.py merely happens to be called apex" in apex.unavailable("optimizers", "amp_C")


def test_a_folder_of_that_name_is_no_package(site):
    (site / "apex").mkdir()
    importlib.invalidate_caches()
    assert "merely happens to be called apex" in apex.unavailable("optimizers", "amp_C")


def test_the_python_only_build_lacks_the_extension(site):
    install(site, folders=("normalization", "optimizers"))
    reason = apex.unavailable("normalization", "fused_layer_norm_cuda_of_no_machine")
    assert "without its CUDA extensions (fused_layer_norm_cuda_of_no_machine is missing)" in reason


def test_nvidias_apex_with_its_extension_is_accepted(site):
    install(site, folders=("normalization", "optimizers"), modules=("amp_C",))
    assert apex.unavailable("optimizers", "amp_C") is None
