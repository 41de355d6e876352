"""A .zst file as a stream that tells when it was cut short: zstandard's own reader takes that for its end."""

from __future__ import annotations

import io
from typing import Any

import zstandard

_CHUNK_BYTES = 1 << 20


def open_zstd(path: str) -> io.BufferedReader:
    """The decompressed bytes of all frames. Reading raises EOFError for a cut file, ZstdError for a damaged one."""
    return io.BufferedReader(_Frames(path), _CHUNK_BYTES)


class _Frames(io.RawIOBase):
    def __init__(self, path: str) -> None:
        self._compressed = open(path, "rb")  # noqa: SIM115 closed below
        self._frame: Any = None
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed and self._decompress():
            pass
        num_bytes = min(len(buffer), len(self._decompressed))
        buffer[:num_bytes] = self._decompressed[:num_bytes]
        self._decompressed = self._decompressed[num_bytes:]
        return num_bytes

    def close(self) -> None:
        self._compressed.close()
        super().close()

    def _decompress(self) -> bool:
        """Take one more piece of the file; false at its end."""
        piece = self._compressed.read(_CHUNK_BYTES)
        if not piece and self._frame is not None:
            raise EOFError("compressed file ended before its end marker")
        content = []
        rest = piece
        while rest:
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            content.append(self._frame.decompress(rest))
            rest = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        self._decompressed = memoryview(b"".join(content))
        return bool(piece)
