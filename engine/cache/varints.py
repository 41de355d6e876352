"""Small whole numbers in few bytes: seven bits a byte, the lowest first; the eighth says that more follow (LEB128).

Most lists of a short record are empty, so zeros come in runs: after a zero stands how many more zeros follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def read_headers(records: Sequence[bytes], count: int) -> tuple[np.ndarray, list[bytes]]:
    """The ``count`` numbers that each record begins with, [R, count] int64, and what follows them.

    Raises ValueError when a record ends before.
    """
    headers, rests = [], []
    for record in records:
        header, end = decode(record, count)
        headers.append(header)
        rests.append(record[end:])
    return np.array(headers, np.int64).reshape(len(records), count), rests


def encode(numbers: Sequence[int]) -> bytes:
    out = bytearray()
    zeros = 0
    for number in [*numbers, -1]:
        if number == 0:
            zeros += 1
            continue
        if zeros:
            out += b"\0" + _varint(zeros - 1)
            zeros = 0
        if number > 0:
            out += _varint(number)
    return bytes(out)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def decode(content: bytes, count: int) -> tuple[list[int], int]:
    """``count`` numbers, and where they end. Raises ValueError when ``content`` ends before, or is of another count."""
    numbers: list[int] = []
    number, shift, is_run = 0, 0, False
    for place, byte in enumerate(content):
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            if is_run:
                if number > count - len(numbers):
                    break
                numbers += [0] * number
                is_run = False
            else:
                numbers.append(number)
                is_run = number == 0
            number, shift = 0, 0
            if len(numbers) == count and not is_run:
                return numbers, place + 1
    raise ValueError(f"ends after {len(numbers)} of {count} numbers")
