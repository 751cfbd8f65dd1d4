"""Start the ranks of a job on this machine, without any launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start_ranks(script: str, world_size: int, *arguments: str) -> list[subprocess.Popen]:
    """One process per rank of tests/multiprocess/SCRIPT, in their own process group each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return [
        subprocess.Popen(
            command,
            env={**base, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish_ranks(processes: list[subprocess.Popen], *, timeout: float = 600, expected: int = 0) -> list[str]:
    """Wait for all ranks; their outputs. Fails with the output when an exit code is not the expected one."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [expected] * len(codes), f"exit codes {codes}\n" + "\n".join(output[-4000:] for output in outputs)
    return outputs


def run_ranks(script: str, world_size: int, *arguments: str, expected: int = 0) -> list[str]:
    return finish_ranks(start_ranks(script, world_size, *arguments), expected=expected)
