"""Sizes as people write them."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """``256MB`` or ``1GiB`` as a number of bytes, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", text, re.IGNORECASE)
    num_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: expected something like 256MB or 1GiB")
    return num_bytes


def show_bytes(num_bytes: int) -> str:
    """As in ``12.3 MB``."""
    for unit in ("GB", "MB", "KB"):
        if num_bytes >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:.1f} {unit}"
    return f"{num_bytes} bytes"
