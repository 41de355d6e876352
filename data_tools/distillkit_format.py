"""Read the compressed log-probabilities that arcee-ai/DistillKit captures from a teacher.

A row of its parquet files is one sequence. Position i is what the teacher expects after ``input_ids`` 0 to i; the last
may be missing. For each, ``bytepacked_indices`` holds k ids, the most probable first, and ``compressed_logprobs`` their
log-probabilities: the first exact_k as floats, the coefficients of a curve through the others, and corrections to the
first of those, if any. Bits count from the highest of a byte; floats are little-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_tools.distillkit_config import FLOAT_BYTES, DistillKitConfig
from engine.errors import DataError


def decode(
    config: DistillKitConfig, packed_ids: Sequence[Any] | np.ndarray, packed_values: Sequence[Any] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k most probable ids of P positions, most probable first, and their log-probabilities.

    What the curve gives may rise from one id to the next, and may bring a position's probabilities above 1 in all.

    Args:
        packed_ids: [P, config.id_bytes] 0 to 255, the ``bytepacked_indices`` of one row.
        packed_values: [P, config.value_bytes] 0 to 255, its ``compressed_logprobs``.

    Returns:
        [P, k] int64 and [P, k] float32.

    Raises DataError when they do not fit the settings, or hold what cannot be an id or a log-probability.
    """
    id_rows = _byte_rows("bytepacked_indices", packed_ids, config.id_bytes)
    value_rows = _byte_rows("compressed_logprobs", packed_values, config.value_bytes)
    if len(id_rows) != len(value_rows):
        raise DataError(f"bytepacked_indices has {len(id_rows)} positions, compressed_logprobs {len(value_rows)}")
    ids = unpack(id_rows, config.id_bits, config.k)
    log_p = _log_p(config, value_rows)
    # Not >=: where ids have gaps, DistillKit takes the greatest id itself for d.
    _refuse(ids > config.d, ids, f"is no id of d = {config.d}: damaged, or packed with another d")
    _refuse(~np.isfinite(log_p), log_p, "is no log-probability: damaged, or packed with other settings")
    return ids, log_p


def basis(config: DistillKitConfig) -> np.ndarray:
    """[k - exact_k, terms] float64: the terms at each point of the curve."""
    count = config.num_approximate
    x = np.linspace(0.0, 1.0, count) if config.normalize_t else np.arange(count, dtype=np.float64)
    special = {"sqrt": np.sqrt, "exp": np.exp}
    terms = [special[term](x) if isinstance(term, str) else x**term for term in config.polynomial_terms]
    return np.array(terms, np.float64).reshape(len(terms), count).T


def unpack(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """[P, bytes] uint8 -> [P, count] int64: numbers of at most 50 bits, end to end, the highest bit of each first."""
    start = np.arange(count) * width
    num_bytes = (width + 14) // 8  # what a number touches that begins at the last bit of a byte
    padded = np.pad(packed, ((0, 0), (0, num_bytes)))
    word = np.zeros((len(packed), count), np.int64)
    for place in range(num_bytes):
        word = word << 8 | padded[:, start // 8 + place]
    return word >> (8 * num_bytes - width - start % 8) & ((1 << width) - 1)


def _log_p(config: DistillKitConfig, rows: np.ndarray) -> np.ndarray:
    """[P, value_bytes] uint8 -> [P, k] float32.

    In float64 throughout, as powers of x leave float16. DistillKit computes in the stored types, and in the end rounds
    deltas' sums to exact_dtype; for float32 the two agree to some 1e-5 of a nat.
    """
    exact, rows = _take_floats(rows, config.exact_dtype, config.exact_k)
    coefficients, rows = _take_floats(rows, config.term_dtype, len(config.polynomial_terms))
    with np.errstate(invalid="ignore", over="ignore"):  # the caller refuses what is not finite
        curve = coefficients @ basis(config).T
        place = 0
        for residual_bin in config.residual_bins:
            end = place + residual_bin.num_elements
            scale, levels = _take_floats(rows, residual_bin.scale_dtype, 1)
            bits = residual_bin.element_bits
            curve[:, place:end] += scale * _signed(unpack(levels, bits, residual_bin.num_elements), bits)
            place, rows = end, rows[:, residual_bin.num_bytes :]
        values = np.concatenate([exact, curve], axis=1)
        return (np.cumsum(values, axis=1) if config.delta_encoding else values).astype(np.float32)


def _take_floats(rows: np.ndarray, dtype: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` floats of each row, as float64, and the bytes after them."""
    end = count * FLOAT_BYTES[dtype]
    content = np.ascontiguousarray(rows[:, :end])
    if dtype == "bfloat16":  # NumPy has none: the upper half of a float32
        floats = (content.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        floats = content.view(f"<f{FLOAT_BYTES[dtype]}")
    return floats.astype(np.float64), rows[:, end:]


def _signed(levels: np.ndarray, width: int) -> np.ndarray:
    """A single bit is -1 or 1; wider levels are shifted so that the lower half is negative."""
    return 2 * levels - 1 if width == 1 else levels - (1 << width - 1)


def _byte_rows(column: str, rows: Sequence[Any] | np.ndarray, num_bytes: int) -> np.ndarray:
    is_whole = isinstance(rows, np.ndarray) and rows.shape[1:] == (num_bytes,)
    for position, row in enumerate(() if is_whole else rows):
        if len(row) != num_bytes:
            raise DataError(f"{column}: position {position} has {len(row)} bytes, the settings ask for {num_bytes}")
    return np.asarray(rows, np.uint8).reshape(-1, num_bytes)


def _refuse(wrong: np.ndarray, values: np.ndarray, problem: str) -> None:
    if wrong.any():
        position, rank = np.argwhere(wrong)[0]
        raise DataError(f"position {position}, rank {rank}: {values[position, rank]} {problem}")
