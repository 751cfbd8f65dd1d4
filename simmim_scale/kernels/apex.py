"""Whether the `apex` that Python would import is NVIDIA's, with the compiled extension that an op needs; in words if it is not.

Nothing is imported to find out: the package of that name on PyPI is a web toolkit whose import fails for reasons of its own.
"""

import importlib.util
from importlib import metadata
from pathlib import Path

BUILD = (
    "build it from https://github.com/NVIDIA/apex with"
    " `APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .` in its checkout"
)


def unavailable(part: str, extension: str) -> str | None:
    """Why `apex.PART` cannot be used, or None if it can.

    Args:
        part: subpackage of NVIDIA's Apex: "normalization", "optimizers".
        extension: compiled top-level module that the part loads when it is used: "fused_layer_norm_cuda", "amp_C".
    """
    location = _location()
    if location is None:
        return f"NVIDIA's Apex is not installed; {BUILD}"
    if not (location / "__init__.py").is_file():
        return f"{location} merely happens to be called apex; start elsewhere or rename it, and {BUILD}"
    if not (location / part).is_dir():
        return f"the installed package apex{_identity()} is not NVIDIA's Apex; `pip uninstall apex`, then {BUILD}"
    if importlib.util.find_spec(extension) is None:
        return f"NVIDIA's Apex is installed without its CUDA extensions ({extension} is missing); {BUILD}"
    return None


def _location() -> Path | None:
    """The directory of the package `apex`, or of what would be imported in its place."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(str(spec.origin))


def _identity() -> str:
    """Version and summary of the distribution `apex`, as far as it has them."""
    try:
        found = metadata.metadata("apex")
    except metadata.PackageNotFoundError:
        return ""
    summary = found.get("Summary")
    return f" {found['Version']}" + (f" ({summary})" if summary and summary != "UNKNOWN" else "")
