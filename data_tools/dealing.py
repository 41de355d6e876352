"""Which documents of the input belong to which part of a build that several jobs share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple

BLOCK_DOCUMENTS = 256
"""Of an input that all parts read, each takes every so many documents in turn."""


class Share(NamedTuple):
    """Part ``number`` of ``num_parts``, counted from 1."""

    number: int
    num_parts: int

    @property
    def folder_name(self) -> str:
        return f"{self.number:05d}-of-{self.num_parts:05d}"

    def __str__(self) -> str:
        return f"{self.number}/{self.num_parts}"


def parse_share(text: str) -> Share:
    """``2/5``, for argparse."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: expected I/N with I from 1 to N, such as 1/8")
    return Share(int(match[1]), int(match[2]))


def deal(sizes_bytes: Sequence[int | None], num_parts: int) -> list[int | None]:
    """The number of the part that reads each input. None where all parts do, each tokenising its own blocks: an input
    larger than an even share, or of unknown size.

    Inputs go to the part that has least so far, the largest first (Graham's LPT rule: at most 4/3 of the best).
    """
    known = [size for size in sizes_bytes if size is not None]
    owners: list[int | None] = [None] * len(sizes_bytes)
    load_bytes = [0] * num_parts
    for source in sorted(range(len(sizes_bytes)), key=lambda each: (-(sizes_bytes[each] or 0), each)):
        size = sizes_bytes[source]
        if size is None or size * num_parts > sum(known):
            continue
        least = min(range(num_parts), key=load_bytes.__getitem__)
        owners[source] = least + 1
        load_bytes[least] += size
    return owners


def is_own(owner: int | None, document: int, share: Share) -> bool:
    """Whether document number ``document`` of an input that ``owner`` reads belongs to this part."""
    if owner is None:
        return document // BLOCK_DOCUMENTS % share.num_parts == share.number - 1
    return owner == share.number
