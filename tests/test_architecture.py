"""The rules of the house that a machine can check: layers, names, lengths, ranks, configuration.

Everything is read from the source with `ast`, so a rule holds for code that no test runs too.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("simmim_scale", "launch", "data_tools")
LONGEST_FILE = 420  # lines
NAMELESS = {"utils", "util", "misc", "helpers", "helper", "common"}

# layer -> what it may import of ours. `None` is everything: these compose the rest.
LAYERS: dict[str, set[str] | None] = {
    "simmim_scale": None,
    "simmim_scale.__main__": None,
    "simmim_scale.cli": None,
    "simmim_scale.bench": None,
    "simmim_scale.config": set(),
    "simmim_scale.kernels": set(),
    "simmim_scale.data": {"simmim_scale.config"},
    "simmim_scale.engine": {"simmim_scale.config", "simmim_scale.kernels"},  # kernels: the optimizer is one
    "simmim_scale.reports": {"simmim_scale.config"},
    "simmim_scale.models": {"simmim_scale.config", "simmim_scale.kernels"},
    "simmim_scale.objectives": {"simmim_scale.config", "simmim_scale.kernels", "simmim_scale.models"},
    "simmim_scale.tasks": {
        "simmim_scale.config",
        "simmim_scale.data",
        "simmim_scale.models",
        "simmim_scale.objectives",
        "simmim_scale.reports",
    },
    "simmim_scale.train": {"simmim_scale.config", "simmim_scale.engine", "simmim_scale.reports"},
    "simmim_scale.sweeps": {"simmim_scale.config", "simmim_scale.reports"},
    "launch": {"simmim_scale.config", "simmim_scale.data.shards"},
    # what decodes: checks and statistics see images as training does
    "data_tools": {
        "simmim_scale.config",
        "simmim_scale.data.shards",
        "simmim_scale.data.bands",
        "simmim_scale.data.decode",
        "simmim_scale.data.jpeg",
    },
}

# Modules that start without torch: they serve commands that answer at once, and machines that only cut shards or start ranks.
TORCH_FREE = (
    "simmim_scale",
    "simmim_scale.config.schema",
    "simmim_scale.data.shards",
    "simmim_scale.data.masks",
    "data_tools.images",
    "launch.cli",
)


def sources(*packages: str) -> list[Path]:
    return [path for package in packages or PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every module of ours that a file imports anywhere, inside functions too, with its line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import x`: x may be a module of the package or a name in it
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if exists(name) else node.module for name in inner]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in PACKAGES)


def covers(layer: str, module: str) -> bool:
    return module == layer or module.startswith(layer + ".")


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "simmim_scale" else ".".join(parts[:2])


def layer_faults(path: Path) -> list[str]:
    layer = layer_of(module_name(path))
    assert layer in LAYERS, f"{path}: {layer} has no row in LAYERS of this test; say what it may import"
    allowed = LAYERS[layer]
    if allowed is None:
        return []
    # the bare root holds nothing but the version
    fine = {layer, *allowed}
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}; {layer} may import {sorted(allowed) or 'nothing of ours'}"
        for line, name in imported(path)
        if name != "simmim_scale" and not any(covers(other, name) for other in fine)
    ]


def test_layers_import_only_what_they_may():
    faults = [fault for path in sources() for fault in layer_faults(path)]
    assert not faults, "\n".join(faults)


def test_the_layer_check_sees_a_forbidden_import(tmp_path, monkeypatch):
    package = tmp_path / "simmim_scale" / "config"
    package.mkdir(parents=True)
    (tmp_path / "simmim_scale" / "train").mkdir()
    bad = package / "bad.py"
    bad.write_text("def late():\n    from simmim_scale import train\n    import simmim_scale.config.schema\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (fault,) = layer_faults(bad)
    assert "bad.py:2 imports simmim_scale.train" in fault


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module}; heavy = {{'torch', 'torchvision', 'deepspeed'}} & set(sys.modules); assert not heavy, heavy"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_imports_are_absolute():
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*sources(), *sources("tests")]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, f"relative imports: {relative}"


def test_nothing_prints_and_nothing_is_global():
    faults = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: print(); log, or write through reports or rich")
            if isinstance(node, ast.Global):
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: global {', '.join(node.names)}; pass it as an argument")
    assert not faults, "\n".join(faults)


def test_files_are_short_and_named_for_what_they_do():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    long = {name: lines for name, lines in long.items() if lines > LONGEST_FILE}
    assert not long, f"longer than {LONGEST_FILE} lines, split by responsibility: {long}"
    nameless = [str(path.relative_to(ROOT)) for path in sources() if {path.stem, *path.parent.parts} & NAMELESS]
    assert not nameless, f"name these for what they do: {nameless}"


def test_every_file_opens_with_its_map():
    bare = [
        str(path.relative_to(ROOT))
        for path in [*sources(), *sources("tests")]
        if path.read_text().strip() and ast.get_docstring(tree(path)) is None
    ]
    assert not bare, f"modules open with a docstring that says what is in them: {bare}"


def rank_checks(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr in {"get_rank", "get_world_size", "get_local_rank"}:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}()"
        if isinstance(node, ast.Constant) and node.value in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: environment variable {node.value}"


def test_only_the_runtime_knows_ranks():
    runtime = ROOT / "simmim_scale" / "engine" / "runtime.py"
    checks = [check for path in sources("simmim_scale") if path != runtime for check in rank_checks(path)]
    assert not checks, "ask a Runtime (engine/runtime.py) instead:\n" + "\n".join(checks)


# ------------------------------------------------------------------------------------------------------- configuration


def config_sections() -> dict[str, type[BaseModel]]:
    from simmim_scale.config import schema

    models = {name: value for name, value in vars(schema).items() if isinstance(value, type) and issubclass(value, BaseModel)}
    return {name: model for name, model in models.items() if model.__module__.startswith("simmim_scale.config.")}


def attributes_read(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        if isinstance(node, ast.MatchClass):
            names.update(node.kwd_attrs)
    return names


def test_every_config_field_is_read_somewhere():
    sections = {Path(sys.modules[model.__module__].__file__) for model in config_sections().values()}
    read = set().union(*(attributes_read(path) for path in sources() if path not in sections))
    unread = sorted(
        f"{section}.{field}"
        for section, model in config_sections().items()
        for field in model.__annotations__
        if field in model.model_fields and field not in read
    )
    assert not unread, f"nothing reads these settings; use them or remove them: {unread}"


def test_every_config_field_says_what_it_is():
    silent = [
        f"{section}.{name}"
        for section, model in config_sections().items()
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert not silent, f"settings without a description: {silent}"


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def config_id(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", CONFIGS, ids=config_id)
def test_every_yaml_loads(path):
    from simmim_scale.config.load import load_config
    from simmim_scale.sweeps.expand import check, expand
    from simmim_scale.sweeps.spec import load_sweep

    if re.search(r"^sweep:", path.read_text(), re.MULTILINE):
        for reduced in (False, True):
            check(expand(load_sweep(path), path, reduced=reduced))
    else:
        load_config(path)


@pytest.mark.parametrize("path", CONFIGS, ids=config_id)
def test_every_yaml_opens_with_command_hardware_and_result(path):
    head = re.match(r"(?:#.*\n)+", path.read_text())
    assert head, f"{path}: opens with a comment that gives command, hardware and expected result"
    missing = [word for word in ("command", "hardware", "expected") if word not in head[0].lower()]
    assert not missing, f"{path}: the comment at the top does not give: {missing}"


# --------------------------------------------------------------------------------------------------------- the house


def test_ci_runs_what_a_person_runs():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run must be executable"
    assert re.search(r"^exec make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_constraints_pin_every_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pins = re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    names = {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", line)[0]).lower() for line in wanted}
    assert names <= pinned, f"not pinned in constraints.txt: {sorted(names - pinned)}"
