"""Masks for masked language models, as a pure function of (mask_seed, sample key, round).

So a cache of teacher targets made today fits the run that is made tomorrow, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.stateless import bits_at, fold, to_unit
from engine.schema import IGNORE

_NEVER = np.iinfo(np.uint64).max
_FATE_STREAM, _STAND_IN_STREAM = np.uint64(1 << 32), np.uint64(1 << 33)
"""far past any position, so the three draws of a position are different numbers"""


@dataclass(frozen=True)
class MaskSettings:
    """How much to mask, and with what. The shares are those of the run YAML's task section."""

    mask_fraction: float
    mask_replace: float
    mask_random: float
    mask_id: int
    """the mask token"""
    ordinary_ids: np.ndarray
    """[R] ids that may stand in as random tokens: all but the special ones"""


def mask_key(mask_seed: int, sample_key: str, round_number: int) -> int:
    """The random key of one sample's mask in one round."""
    return fold("mask", mask_seed, sample_key, round_number)


def token_weights(token_counts: np.ndarray, mask_smoothing: float) -> np.ndarray | None:
    """[V] float64 count^-mask_smoothing, scaled so that the most frequent token has 1; None where all are alike.

    A token that was never counted weighs as much as one met once. From XLM, arXiv 1901.07291.
    """
    if mask_smoothing == 0.0:
        return None
    counts = np.maximum(token_counts, 1).astype(np.float64)
    return (counts / counts.max()) ** -mask_smoothing


def mask_tokens(
    token_ids: np.ndarray,
    maskable: np.ndarray,
    lengths: Sequence[int],
    *,
    keys: Sequence[int],
    settings: MaskSettings,
    weights: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """input_ids [N] int64 and labels [N] int64 (the token where it is to be predicted, else IGNORE).

    ``token_ids`` and ``maskable`` [N] lay samples of ``lengths`` [B] end to end, each masked by its own of the
    ``keys`` [B] and not by its neighbours. Of a sample exactly max(1, round(mask_fraction * maskable tokens)) are
    chosen without replacement, none when no token is maskable, with chances in proportion to ``weights`` [V] (None:
    equal): the smallest of -log(u) / w, from Efraimidis and Spirakis, Weighted random sampling with a reservoir, IPL
    97 (2006). Each of them is shown as ``mask_id``, as a random ordinary token, or unchanged, by ``settings``.
    """
    input_ids = token_ids.astype(np.int64)
    labels = np.full(len(token_ids), IGNORE, dtype=np.int64)
    ends = np.cumsum(lengths)
    positions = np.arange(len(token_ids), dtype=np.uint64) - np.repeat((ends - lengths).astype(np.uint64), lengths)
    key_of = np.repeat(np.array(keys, dtype=np.uint64), lengths)
    bits = bits_at(key_of, positions)
    rank = bits if weights is None else -np.log(to_unit(bits)) / weights[token_ids]
    rank[~maskable] = _NEVER if weights is None else np.inf
    chosen = _smallest(rank, maskable, ends.tolist(), settings.mask_fraction)
    labels[chosen] = input_ids[chosen]
    key_of, positions = key_of[chosen], positions[chosen]
    fate = to_unit(bits_at(key_of, positions + _FATE_STREAM))
    pick = bits_at(key_of, positions + _STAND_IN_STREAM) % np.uint64(len(settings.ordinary_ids))
    shown = np.where(fate < settings.mask_replace, settings.mask_id, settings.ordinary_ids[pick])
    changed = fate < settings.mask_replace + settings.mask_random
    input_ids[chosen[changed]] = shown[changed]
    return input_ids, labels


def _smallest(rank: np.ndarray, maskable: np.ndarray, ends: list[int], fraction: float) -> np.ndarray:
    """Where the samples' lowest ranks are: of each as many as are to be masked."""
    chosen = [np.empty(0, dtype=np.int64)]
    for start, end in zip([0, *ends], ends):
        num_maskable = np.count_nonzero(maskable[start:end])
        if num_maskable:
            count = max(1, round(fraction * num_maskable))
            chosen.append(np.argpartition(rank[start:end], count - 1)[:count] + start)
    return np.concatenate(chosen)
