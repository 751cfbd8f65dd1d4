"""Memory that a step freed is there for the next one, without page faults."""

import os
import platform
import subprocess
import sys

import pytest

# Like a step: several large tensors, all freed at its end. Prints the pages that rounds 3 to 6 touched for the first time.
STEPS = """
import resource, sys, torch
from simmim_scale.engine.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else False)
for round in range(6):
    if round == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(5 << 20) for _ in range(10)]  # 20 MiB each
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 200 * 2**20 // os.sysconf("SC_PAGE_SIZE")  # of one round


def run(mode: str, **environment: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    found = subprocess.run(
        [sys.executable, "-c", STEPS, mode], env=clean | environment, capture_output=True, text=True, check=True, timeout=120
    )
    kept, faults = found.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_round_touches_no_new_pages():
    kept, faults = run("keep")
    assert kept
    assert faults < PAGES / 4  # four rounds would touch 4 * PAGES


def test_somebodys_own_settings_are_left_alone():
    assert not run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0]
