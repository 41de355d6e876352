"""Asked of the real C library, in processes of their own: the choice cannot be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS = """
import resource, sys
sys.path.insert(0, "{root}")
from engine.host import keep_freed_memory
import torch
print(keep_freed_memory())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
PAGES = (64 << 20) // 4096

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")


def outcome(**variables: str) -> tuple[bool, int]:
    """Whether anything was set, and the page faults of the second tensor of 64 MiB."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(root=ROOT)],
        env={**unset, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    changed, faults = done.stdout.split()
    return changed == "True", int(faults)


@glibc
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    changed, faults = outcome()
    assert changed
    assert faults < PAGES // 100


@glibc
def test_the_users_choice_stands() -> None:
    changed, faults = outcome(MALLOC_TRIM_THRESHOLD_="131072")
    assert not changed
    assert faults > 16  # few where the kernel gives pages of 2 MiB
