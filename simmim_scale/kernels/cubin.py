"""What a kernel that was compiled ahead of time needs, read from its machine code by Triton's own cuobjdump."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path


def read_resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, per thread: a stack above 0 means that the kernel spills.

    Raises:
        RuntimeError: cuobjdump fails.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", result.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump did not tell registers and stack (exit code {result.returncode}): {result.stderr.strip()}")
    return int(found[1]), int(found[2])


@functools.cache
def _cuobjdump() -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump")
