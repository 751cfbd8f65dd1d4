"""The C library's allocator on a CPU: told to keep what is freed, since a training step asks for the same memory again.

By default glibc hands freed memory back to the kernel, which clears it page by page when the next step touches it: 125,000 pages
and a tenth of a step of SwinV2-T (benchmarks/2026-11-24-step-cpu).
"""

import ctypes
import logging
import os

logger = logging.getLogger(__name__)

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no larger one; what is larger is mapped and unmapped each time
_KEEP = (1 << 31) - 1  # bytes at the end of a heap: the largest int

# Somebody's own settings, or another allocator, come first.
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Freed memory stays with the process, up to 2 GiB a heap. Returns whether it was set: only on glibc, and unless the
    environment already tunes the allocator."""
    set_by_user = [name for name in _SETTINGS if os.environ.get(name)]
    if set_by_user:
        logger.debug("allocator left as %s say", ", ".join(set_by_user))
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_TRIM_THRESHOLD, _KEEP))
