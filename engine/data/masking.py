"""Masks for masked language models, as a pure function of (mask_seed, sample key, round).

So a cache of teacher targets made today fits the run that is made tomorrow, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.stateless import bits_at, fold
from engine.schema import IGNORE

_TO_31_BITS = np.uint64(33)
"""the rank of a place is the high half of its random number, its fate the low half"""
_SECOND_DRAW = np.int64(1 << 32)
"""far past any place: a number of the same stream that serves nothing else"""


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
    if len(token_ids) == 0:
        return input_ids, labels
    starts = np.cumsum(lengths) - lengths
    streams = np.array(keys, dtype=np.uint64)
    places = np.arange(max(lengths))
    is_token = places < np.array(lengths)[:, None]
    bits = bits_at(streams[:, None], places)
    rank = (bits >> _TO_31_BITS).astype(np.uint32)
    if weights is not None:
        weight = np.ones(is_token.shape)
        weight[is_token] = weights[token_ids]
        rank = (-np.log((rank + 0.5) * 2.0**-31) / weight).astype(np.float32)
    is_maskable = np.zeros(is_token.shape, dtype=bool)
    is_maskable[is_token] = maskable
    in_grid = np.flatnonzero(_lowest(rank, is_maskable, settings.mask_fraction))
    samples, columns = np.divmod(in_grid, len(places))
    chosen = starts[samples] + columns
    labels[chosen] = input_ids[chosen]
    fate = bits.ravel()[in_grid].astype(np.uint32)
    stand_in = _pick(settings.ordinary_ids, bits_at(streams[samples], columns + _SECOND_DRAW))
    shown = np.where(fate < settings.mask_replace * 2.0**32, settings.mask_id, stand_in)
    changed = fate < (settings.mask_replace + settings.mask_random) * 2.0**32
    input_ids[chosen[changed]] = shown[changed]
    return input_ids, labels


def _lowest(rank: np.ndarray, allowed: np.ndarray, fraction: float) -> np.ndarray:
    """[B, T] bool: in each row the allowed places of lowest ``rank`` [B, T], as many as are to be masked.

    Ranks have four bytes because sorting those is several times as fast. They may be equal, once in some ten thousand
    samples at the cut; then the first places are taken.
    """
    never = np.inf if rank.dtype == np.float32 else np.iinfo(np.uint32).max
    rank[~allowed] = never
    num_allowed = np.count_nonzero(allowed, axis=1)
    counts = np.where(num_allowed > 0, np.maximum(1, np.rint(fraction * num_allowed)), 0).astype(np.int64)
    highest = np.sort(rank, axis=1)[np.arange(len(rank)), counts - 1]
    lowest = (rank <= highest[:, None]) & (counts > 0)[:, None]
    excess = np.count_nonzero(lowest, axis=1) - counts
    for row in np.flatnonzero(excess):
        lowest[row, np.flatnonzero(rank[row] == highest[row])[-excess[row] :]] = False
    return lowest


def _pick(choices: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """One of the ``choices`` for each uint64, all as likely but for one part in 2^32 (no division: it is slow)."""
    return choices[(((bits >> np.uint64(32)) * np.uint64(len(choices))) >> np.uint64(32)).astype(np.int64)]
