"""`simmim bench compile`: compiles every Triton kernel that dispatch may pick, for GPUs that need not be here.

Results are appended to OUT/compiled.jsonl as they come, so that an interrupted sweep goes on where it was; OUT/README.md reports,
and is renewed on the way.
"""

import functools
import json
import logging
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia

from simmim_scale.kernels.window_attention.triton_ahead import Problem, compile_kernel, source_digest
from simmim_scale.kernels.window_attention.triton_tiles import COMPILED, SHARED_MEMORY, refuse, tile_summary

log = logging.getLogger(__name__)

# Windows of Swin-T to SwinV2-G; late stages at small inputs use one of the smaller windows.
WINDOWS = (6, 7, 8, 12, 14, 16, 20, 24)
HEAD_DIM = 32  # of all published Swin and SwinV2 models: every form of the kernels is compiled for it
# Of other layouts: compiled in the form that needs the most registers (V2, shifted).
OTHER_HEAD_DIMS = (16, 44, 64, 88, 96, 128)
RECTANGLES = ((6, 12), (7, 14), (9, 5), (7, 24))  # windows of inputs whose sides differ
PROGRESS_EVERY = 100  # kernels; the report is renewed as often
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def problems(dtypes: Iterable[str]) -> Iterator[Problem]:
    """Every configuration of the sweep that dispatch may pick, for the types given; the hardest to compile come first.

    Raises:
        ValueError: unknown type.
    """
    names = list(dtypes)
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise ValueError(f"unknown type {unknown[0]!r}. Known: {', '.join(DTYPES)}.")
    types = [DTYPES[name] for name in names]
    squares = [(side, side) for side in WINDOWS]
    for dtype, window in product(types, squares):
        yield Problem(window, HEAD_DIM, dtype, cosine=True, shifted=True)
    for side, head_dim, dtype in product(WINDOWS, OTHER_HEAD_DIMS, types):
        yield Problem((side, side), head_dim, dtype, cosine=True, shifted=True)
    for dtype, window in product(types, RECTANGLES):
        yield Problem(window, HEAD_DIM, dtype, cosine=True, shifted=True)
    for dtype, window, (cosine, shifted) in product(types, squares, ((True, False), (False, True), (False, False))):
        yield Problem(window, HEAD_DIM, dtype, cosine, shifted)


def parse_capabilities(texts: Iterable[str] | None) -> list[tuple[int, int]]:
    """ "9.0" -> (9, 0); None: all that dispatch lets in.

    Raises:
        ValueError: not one of those.
    """
    known = {f"{major}.{minor}": (major, minor) for major, minor in SHARED_MEMORY}
    if not texts:
        return list(COMPILED)
    unknown = [text for text in texts if text not in known]
    if unknown:
        raise ValueError(f"unknown compute capability {', '.join(unknown)}. Known: {', '.join(known)}.")
    return [known[text] for text in texts]


def sweep(
    out: Path,
    *,
    dtypes: Iterable[str] = tuple(DTYPES),
    capabilities: Iterable[tuple[int, int]] = COMPILED,
    jobs: int = 1,
    progress: Callable[[str], None] = log.info,
) -> int:
    """Compile what is not in OUT yet, write the report, and return the number of kernels with faults.

    Args:
        out: directory of compiled.jsonl and README.md.
        dtypes: "bf16", "fp16", "fp32".
        capabilities: compute capabilities; keys of `SHARED_MEMORY`.
        jobs: processes that compile.
        progress: called with a line for each kernel that has faults, and now and then.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / "compiled.jsonl"
    done = {_key(row) for row in read_record(record)}
    planned = (
        (row, problem, capability)
        for problem, capability in product(list(problems(dtypes)), list(capabilities))
        for row in _planned(problem, capability)
    )
    tasks = [task for task in planned if _key(task[0]) not in done]
    with record.open("a") as file:
        for number, row in enumerate(_compile_all(tasks, jobs), start=1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if row["faults"]:
                progress(f"FAULT {row['kernel']} {row['window']} head dim {row['head_dim']} {_group(row)}: {row['faults']}")
            if number % PROGRESS_EVERY == 0:
                progress(f"{number} of {len(tasks)} kernels compiled")
                (out / "README.md").write_text(report(*_current(read_record(record))))
    rows, missing = _current(read_record(record))
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "README.md").write_text(report(rows, missing))
    return sum(bool(row["faults"]) for row in rows)


def _compile_all(tasks: list[tuple[dict[str, Any], Problem, tuple[int, int]]], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of the tasks with their results, as they are ready."""
    if jobs == 1:
        yield from (_compiled(*task) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_compiled, *task) for task in tasks]):
            yield future.result()


def read_record(path: Path) -> list[dict[str, Any]]:
    """Rows of compiled.jsonl; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _planned(problem: Problem, capability: tuple[int, int]) -> list[dict[str, Any]]:
    name = next(name for name, dtype in DTYPES.items() if dtype == problem.dtype)
    shared = {
        "window": list(problem.window),
        "head_dim": problem.head_dim,
        "dtype": name,
        "form": "V2" if problem.cosine else "V1",
        "shifted": problem.shifted,
        "capability": list(capability),
        "triton": triton.__version__,
    }
    if refuse(problem.tokens, problem.head_dim, capability) is not None:
        return []
    tiles = problem.tiles(capability)
    return [
        shared | {"kernel": kernel, "source": _digest(kernel), "tiles": tile_summary(tiles, kernel)}
        for kernel in problem.kernels(capability)
    ]


_digest = functools.cache(source_digest)


def _current(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of what dispatch may pick now, and how many it may pick that are missing, by GPU and type."""
    wanted = {
        _key(row): _group(row) for problem in problems(DTYPES) for capability in COMPILED for row in _planned(problem, capability)
    }
    found = {_key(row): row for row in rows if _key(row) in wanted}
    return list(found.values()), Counter(group for key, group in wanted.items() if key not in found)


def _group(row: dict[str, Any]) -> str:
    return f"sm_{row['capability'][0]}{row['capability'][1]} {row['dtype']}"


def _key(row: dict[str, Any]) -> str:
    names = ("window", "head_dim", "dtype", "form", "shifted", "capability", "triton", "kernel", "source", "tiles")
    return json.dumps([row.get(name) for name in names])


def _compiled(row: dict[str, Any], problem: Problem, capability: tuple[int, int]) -> dict[str, Any]:
    usage = compile_kernel(row["kernel"], problem, capability)
    numbers = {name: asdict(usage)[name] for name in ("warps", "registers", "stack", "shared", "shared_limit", "tensor_core")}
    return row | numbers | {"faults": usage.faults}


def report(rows: list[dict[str, Any]], missing: Counter[str]) -> str:
    """The README of a sweep: what was compiled, what is wrong, and the table of the worst case of each kernel and window."""
    faulty = [row for row in rows if row["faults"]]
    versions = ", ".join(sorted({row["triton"] for row in rows}))
    counts = Counter(_group(row) for row in rows)
    lines = [
        "# Window attention in Triton, compiled ahead of time",
        "",
        f"{date.today().isoformat()}, Triton {versions}, torch {torch.__version__}, ptxas {_ptxas_versions()}; no GPU needed.",
        "Written by `simmim bench compile --jobs 2 --out DIR`, which goes on where it was; every kernel is a line of",
        "`compiled.jsonl`. Registers, and bytes of stack, are per thread as `cuobjdump -res-usage` tells them; a stack above 0",
        "would mean spills. Shared memory is in bytes, of one program. It says that the kernels can run, not how fast they are.",
        "",
        f"**{len(rows)} kernels, {len(faulty)} with faults** (stack, shared memory over the limit, or no tensor cores).",
        _most(rows),
        "",
        f"Kernels per architecture and type: {_counted(counts)}.",
        "",
        f"Not compiled yet, though dispatch may pick them: {_counted(missing)}.",
        "",
    ]
    if faulty:
        lines += ["## Faults", "", *_table(faulty, each=True), ""]
    lines += ["## Worst case over V1 and V2, shifted and not", "", *_table(rows, each=False), ""]
    return "\n".join(lines)


def _most(rows: list[dict[str, Any]]) -> str:
    """The largest figures of all kernels."""
    if not rows:
        return ""
    registers, stack = (max(row[name] for row in rows) for name in ("registers", "stack"))
    closest = max(rows, key=lambda row: row["shared"] / row["shared_limit"])
    return (
        f"At most: {registers} registers, {stack} bytes of stack, {closest['shared'] / closest['shared_limit']:.0%} of a device's"
        f" shared memory ({closest['shared']:,} of {closest['shared_limit']:,} bytes on {_group(closest).split()[0]})."
    )


def _ptxas_versions() -> str:
    """Of the assemblers that Triton brings: one up to sm_90, and one for later GPUs."""
    tools = sorted(Path(triton.backends.nvidia.__file__).parent.glob("bin/ptxas*"))
    texts = [subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=False).stdout for tool in tools]
    return " and ".join(found[1] for text in texts if (found := re.search(r"release [\d.]+, V([\d.]+)", text)))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none"


def _table(rows: list[dict[str, Any]], *, each: bool) -> list[str]:
    """Markdown; `each`: one line a kernel, else the largest numbers of a kernel, type, window, head dim and architecture."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        key = (row["dtype"], *row["window"], row["head_dim"], row["kernel"], *row["capability"], number if each else 0)
        groups.setdefault(key, []).append(row)
    lines = ["| type | window | head dim | kernel | GPU | tiles | registers | stack | shared memory | limit |", "|---" * 10 + "|"]
    for (dtype, height, width, head_dim, kernel, major, minor, _), members in sorted(groups.items()):
        most = {name: max(row[name] for row in members) for name in ("registers", "stack", "shared", "shared_limit")}
        tiles = " / ".join(sorted({row["tiles"] for row in members}))
        lines.append(
            f"| {dtype} | {height}x{width} | {head_dim} | {kernel.removesuffix('_kernel')} | sm_{major}{minor} | {tiles} |"
            f" {most['registers']} | {most['stack']} | {most['shared']:,} | {most['shared_limit']:,} |"
        )
    return lines
