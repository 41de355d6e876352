"""Masks for masked language models, as a pure function of (mask_seed, sample key, round).

So a cache of teacher targets made today fits the run that is made tomorrow, on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.data.stateless import fold, random_bits, to_unit
from engine.schema import IGNORE


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


def mask_sample(
    token_ids: np.ndarray, maskable: np.ndarray, *, key: int, settings: MaskSettings, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """input_ids [T] int64 and labels [T] int64 (the token where it is to be predicted, else IGNORE).

    ``maskable`` [T] bool. Exactly max(1, round(mask_fraction * maskable tokens)) are chosen without replacement, none
    when no token is maskable, with chances in proportion to ``weights`` [V] (None: equal): the smallest of -log(u)/w,
    Efraimidis and Spirakis, Weighted random sampling with a reservoir, IPL 97 (2006). Of the chosen, each is shown as
    ``mask_id``, as a random ordinary token, or unchanged, by the shares of ``settings``.
    """
    input_ids = token_ids.astype(np.int64)
    labels = np.full(len(token_ids), IGNORE, dtype=np.int64)
    candidates = np.flatnonzero(maskable)
    if len(candidates) == 0:
        return input_ids, labels
    count = max(1, round(settings.mask_fraction * len(candidates)))
    bits = random_bits(key, len(candidates) + 2 * count)
    rank: np.ndarray = bits[: len(candidates)]
    if weights is not None:
        rank = -np.log(to_unit(rank)) / weights[token_ids[candidates]]
    chosen = candidates[np.argpartition(rank, count - 1)[:count]]
    chosen.sort()
    labels[chosen] = input_ids[chosen]
    fate = to_unit(bits[len(candidates) : len(candidates) + count])
    stand_in = settings.ordinary_ids[bits[len(candidates) + count :] % np.uint64(len(settings.ordinary_ids))]
    shown = np.where(fate < settings.mask_replace, settings.mask_id, stand_in)
    changed = fate < settings.mask_replace + settings.mask_random
    input_ids[chosen[changed]] = shown[changed]
    return input_ids, labels
