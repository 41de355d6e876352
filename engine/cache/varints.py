"""Small whole numbers in few bytes: seven bits a byte, the lowest first; the eighth says that more follow (LEB128)."""

from __future__ import annotations

from collections.abc import Iterable


def encode(numbers: Iterable[int]) -> bytes:
    out = bytearray()
    for number in numbers:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
    return bytes(out)


def decode(content: bytes, count: int) -> tuple[list[int], int]:
    """``count`` numbers, and where they end. Raises ValueError when ``content`` ends before."""
    numbers, number, shift = [], 0, 0
    for place, byte in enumerate(content):
        if byte > 127:
            number |= (byte & 127) << shift
            shift += 7
            continue
        numbers.append(number | byte << shift)
        if len(numbers) == count:
            return numbers, place + 1
        number, shift = 0, 0
    raise ValueError(f"ends after {len(numbers)} of {count} numbers")
