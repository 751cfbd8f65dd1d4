"""What the head tells a node on its standard input: one line that holds the whole order."""

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

# Variables of this shell that the ranks on all nodes get. CUDA_VISIBLE_DEVICES and paths of libraries are each node's own.
FORWARDED = re.compile(
    r"(?:NCCL|GLOO|UCX|FI|OFI|DS|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|TP|SIMMIM|WANDB|HF|AWS|FSSPEC|OMP|MKL|PYTHON)_?[A-Z0-9_]*"
    r"|CUDA_LAUNCH_BLOCKING|CUDA_DEVICE_MAX_CONNECTIONS|(?:HTTPS?|NO|ALL)_PROXY|(?:https?|no|all)_proxy"
)
DEEPSPEED_ENV = ".deepspeed_env"  # DeepSpeed's file of more variables, in the working or the home directory


@dataclass(frozen=True, kw_only=True)
class Order:
    """One start, as every node hears it.

    Args:
        secret: proves to the head that who connects is a node of this start.
        addresses: where each node finds the head.
        port: at which port.
        world: devices by node, in the order of ranks.
        program: what every rank runs, see `Job`.
        log_dir: directory of the ranks' output, on a file system that all nodes share.
        grace: seconds to save after a request to stop.
        launcher: who starts the ranks on a node: deepspeed or torchrun.
        silence: seconds without a word after which the other end of a connection counts as lost.
        heartbeat: seconds without a heartbeat of a rank; stall: seconds without progress; start: the same before its first step.
        environment: variables for the ranks.
    """

    secret: str
    addresses: tuple[str, ...]
    port: int
    world: dict[str, tuple[int, ...]]
    program: tuple[str, ...]
    log_dir: str
    grace: float
    launcher: str
    silence: float
    heartbeat: float
    stall: float
    start: float
    environment: dict[str, str]

    def encode(self) -> bytes:
        return base64.b64encode(json.dumps(asdict(self)).encode()) + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Self:
        values = json.loads(base64.b64decode(line))
        for name in ("addresses", "program"):
            values[name] = tuple(values[name])
        values["world"] = {name: tuple(devices) for name, devices in values["world"].items()}
        return cls(**values)


def forwarded_environment(inherited: Mapping[str, str], exports: Iterable[str]) -> dict[str, str]:
    """The variables that travel: those of the known families, those of a .deepspeed_env, and those asked for.

    Args:
        exports: NAME, to take it from here, or NAME=VALUE.

    Raises:
        ValueError: a name that is not set here, or a line of .deepspeed_env that is no assignment.
    """
    chosen = {name: value for name, value in inherited.items() if FORWARDED.fullmatch(name)}
    chosen.update(_deepspeed_environment())
    for text in exports:
        name, given, value = text.partition("=")
        if not given and name not in inherited:
            raise ValueError(f"--export: {name} is not set in this shell. Give its value: --export {name}=VALUE")
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"--export: got {text!r}, expected NAME or NAME=VALUE, where NAME is letters, digits and _.")
        chosen[name] = value if given else inherited[name]
    return chosen


def _deepspeed_environment() -> dict[str, str]:
    chosen: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        path = folder / DEEPSPEED_ENV
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, given, value = line.partition("=")
            if not given or not name.strip():
                raise ValueError(f"{path}:{number}: got {line!r}, expected NAME=VALUE.")
            chosen[name.strip()] = value.strip()
    return chosen
