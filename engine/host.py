"""What this process asks of the machine it runs on."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The parameters' numbers in glibc's malloc.h."""
_NEVER = 2**31 - 1
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """For tensors on a CPU: memory that a step frees stays with this process, for the next step to use again.

    glibc gives large blocks back to the kernel at once, and each new page costs a fault: a tenth of a step's time
    where gradients are some 50 MB. Returns False, with nothing changed, on another C library or where the user has
    already chosen how memory is handled.
    """
    if any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, _NEVER) == 1, mallopt(_TRIM_THRESHOLD, _NEVER) == 1])
