"""The ``hidden`` codec: the states that go into the teacher's head, whole, and those of layers that hidden terms need.

A record: varints (positions with a label, tokens), then the states at the positions, then for each kept layer those at
all tokens, a row each. A row is its values; in fp8 (e4m3) a float32 scale before them, its largest value over 448.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.cache import varints
from engine.errors import CacheError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
RELATIVE_ERROR = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4}
"""Of a value of normal size, at most; in fp8 of one that is not tiny beside the row's largest."""


class StatesCodec:
    """Rows of ``width`` values as ``dtype``."""

    def __init__(self, dtype: str, width: int, num_layers: int) -> None:
        self._dtype, self._width, self._num_layers = dtype, width, num_layers
        self._row_bytes = 4 + width if dtype == "fp8" else width * _DTYPES[dtype].itemsize

    def encode(self, hidden: Tensor, layers: Sequence[Tensor]) -> bytes:
        """The record of one sample: [N, G] states at its labelled positions, [T, G] of each layer; on the CPU.

        Raises CacheError for a state that is too large for the type.
        """
        num_tokens = len(layers[0]) if layers else 0
        rows = torch.cat([hidden, *layers])
        return varints.encode([len(hidden), num_tokens]) + self._to_bytes(rows).numpy().tobytes()

    def decode(self, records: Sequence[bytes]) -> tuple[Tensor, list[Tensor]]:
        """[N, G] of all records one after another, and [T, G] of each layer likewise.

        Raises ValueError when a record is not as long as it says.
        """
        nothing = self._from_bytes(torch.empty(0, dtype=torch.uint8))
        hidden: list[Tensor] = [nothing]
        layers: list[list[Tensor]] = [[nothing] for _ in range(self._num_layers)]
        for record in records:
            (num_positions, num_tokens), start = varints.decode(record, 2)
            sizes = [num_positions] + [num_tokens] * self._num_layers
            if len(record) - start != sum(sizes) * self._row_bytes:
                raise ValueError(f"is {len(record)} bytes, expected {start + sum(sizes) * self._row_bytes} of them")
            octets = torch.frombuffer(bytearray(record[start:]), dtype=torch.uint8) if sum(sizes) else torch.empty(0)
            first, *others = self._from_bytes(octets).split(sizes)
            hidden.append(first)
            for layer, part in zip(layers, others):
                layer.append(part)
        return torch.cat(hidden), [torch.cat(layer) for layer in layers]

    def parts(self, record: bytes) -> dict[str, int]:
        """What the bytes of a record are for. Raises ValueError."""
        _, start = varints.decode(record, 2)
        return {"header": start, "states": len(record) - start}

    def _to_bytes(self, rows: Tensor) -> Tensor:
        if self._dtype != "fp8":
            kept = rows.to(_DTYPES[self._dtype]).contiguous()
            if not kept.isfinite().all():  # the teacher's own are, by now
                raise CacheError(
                    f"a state of {rows.abs().max():.3g} is past what {self._dtype} can hold; set "
                    "cache.codec.dtype: bf16"
                )
            return kept.view(torch.uint8)
        scale = (rows.float().abs().amax(dim=1, keepdim=True) / _FP8_MAX).clamp_min(1e-30)
        scaled = (rows.float() / scale).to(_FP8)
        return torch.cat([scale.view(torch.uint8), scaled.view(torch.uint8)], dim=1)

    def _from_bytes(self, octets: Tensor) -> Tensor:
        table = octets.view(-1, self._row_bytes) if octets.numel() else octets.view(0, self._row_bytes).byte()
        if self._dtype != "fp8":
            return table.view(_DTYPES[self._dtype])
        scale = table[:, :4].contiguous().view(torch.float32)
        return table[:, 4:].contiguous().view(_FP8).float() * scale
