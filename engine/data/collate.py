"""Samples -> one padded Batch. All index arithmetic is done here in NumPy, so that no step waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.schema import IGNORE, Batch, Sample

PAD_MULTIPLE = 8
"""Widths are multiples of this: tensor cores and the memory-efficient attention kernel ask for it."""

Labelled = tuple[np.ndarray, np.ndarray]
"""input_ids [N] and labels [N] of samples laid end to end; nothing for a sample that is not sound"""


def collate(
    samples: Sequence[Sample], labelled: Labelled, *, pad_id: int, sequence_tokens: int, one_width: bool = False
) -> Batch:
    """Samples, with their input ids and labels, as a Batch.

    T is the longest sample rounded up to a multiple of 8, but at most ``sequence_tokens``; with ``one_width`` always
    that. A sample that is not sound becomes a row of padding that counts nowhere; it is one segment, so that attention
    over it is defined.
    """
    lengths = np.array([len(sample.token_ids) if sample.sound else 0 for sample in samples])
    longest = int(lengths.max())
    assert longest <= sequence_tokens
    width = min(max(-(-longest // PAD_MULTIPLE), 1) * PAD_MULTIPLE, sequence_tokens)
    width = sequence_tokens if one_width else width
    is_token = np.arange(width) < lengths[:, None]
    input_ids, labels = (_grid(flat, is_token, fill) for flat, fill in zip(labelled, (pad_id, IGNORE)))
    segments, starts, packed = _documents(samples, lengths, width)
    positions = np.arange(segments.size) - starts
    positions[segments == 0] = 0
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        segment_ids=torch.from_numpy(segments.reshape(is_token.shape)),
        position_ids=torch.from_numpy(positions.reshape(is_token.shape)),
        label_rows=torch.from_numpy(np.flatnonzero(labels != IGNORE)),
        token_rows=torch.from_numpy(np.flatnonzero(is_token)),
        packed=packed,
        names=tuple(sample.name for sample in samples),
        piece_ids=_piece_ids(samples, is_token),
        examples=tuple(sample.annotation.example if sample.annotation else b"" for sample in samples),
    )


def _grid(flat: np.ndarray, is_token: np.ndarray, fill: int) -> np.ndarray:
    """[B, T] int64, with ``flat`` where there are tokens."""
    if len(flat) == is_token.size:
        return flat.astype(np.int64, copy=False).reshape(is_token.shape)
    grid = np.full(is_token.shape, fill, dtype=np.int64)
    grid[is_token] = flat
    return grid


def _piece_ids(samples: Sequence[Sample], is_token: np.ndarray) -> torch.Tensor | None:
    if not any(sample.annotation for sample in samples):
        return None
    flat = [
        np.repeat(np.arange(2)[: len(a.piece_tokens)], a.piece_tokens) for a in (s.annotation for s in samples) if a
    ]
    return torch.from_numpy(_grid(np.concatenate(flat), is_token, 0))


def _documents(samples: Sequence[Sample], lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """[B*T] int32 segment ids, [B*T] where the document of each position starts, and whether the batch is packed.

    Every row ends with a piece of segment 0, its padding; it is empty where the row is full. So all rows together
    are one line of pieces, and two calls of ``repeat`` lay it out.
    """
    pieces: list[int] = []
    segments: list[int] = []
    for sample, length in zip(samples, lengths.tolist()):
        documents = sample.document_tokens.tolist() if sample.sound else [width]
        pieces += [*documents, width - length if sample.sound else 0]
        segments += [*range(1, len(documents) + 1), 0]
    sizes = np.array(pieces)
    starts = np.cumsum(sizes) - sizes
    packed = bool(np.count_nonzero(sizes) > len(samples))
    return np.repeat(np.array(segments, dtype=np.int32), sizes), np.repeat(starts, sizes), packed
