"""Masks: stateless and the same for ever, exact in number, right in their shares and in what they prefer."""

from __future__ import annotations

import numpy as np
import pytest

from engine.data.masking import MaskSettings, _lowest, mask_key, mask_tokens, token_weights
from engine.schema import IGNORE

MASK_ID = 4
SETTINGS = MaskSettings(
    mask_fraction=0.15, mask_replace=0.8, mask_random=0.1, mask_id=MASK_ID, ordinary_ids=np.arange(5, 1000)
)

GOLDEN_UNIFORM = ([7, 13, 16, 22, 26, 27], [4, 4, 4, 66, 4, 291])
GOLDEN_SMOOTHED = ([2, 4, 5, 21, 32, 34], [4, 4, 4, 4, 4, 4])
"""positions and what is shown there: caches of targets hold teachers' answers to exactly these masks"""


def masked(key: int, token_ids: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    return mask_tokens(token_ids, token_ids >= 5, [len(token_ids)], keys=[key], settings=SETTINGS, weights=weights)


def test_masks_are_what_they_always_were() -> None:
    token_ids = np.arange(0, 120, 3, dtype=np.uint16)
    input_ids, labels = masked(mask_key(17, "000001-00000042", 3), token_ids)
    chosen = np.flatnonzero(labels != IGNORE).tolist()
    assert (chosen, input_ids[chosen].tolist()) == GOLDEN_UNIFORM
    weights = token_weights(np.arange(1000), 0.7)
    input_ids, labels = masked(mask_key(17, "000001-00000042", 3), token_ids, weights)
    chosen = np.flatnonzero(labels != IGNORE).tolist()
    assert (chosen, input_ids[chosen].tolist()) == GOLDEN_SMOOTHED


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 1), (3, 1), (10, 2), (100, 15), (512, 77)])
def test_number_of_masked_tokens_is_exact(num_tokens: int, expected: int) -> None:
    token_ids = np.concatenate([[1], np.arange(5, 5 + num_tokens), [2]])
    for key in range(50):
        _, labels = masked(key, token_ids)
        assert (labels != IGNORE).sum() == expected


def test_labels_hold_the_true_token_and_the_rest_is_untouched() -> None:
    token_ids = np.arange(5, 205)
    for key in range(50):
        input_ids, labels = masked(key, token_ids)
        chosen = labels != IGNORE
        assert (labels[chosen] == token_ids[chosen]).all()
        assert (input_ids[~chosen] == token_ids[~chosen]).all()


def test_special_tokens_are_never_masked() -> None:
    token_ids = np.array([1, 9, 2, 1, 8, 3, 2])
    for key in range(200):
        input_ids, labels = masked(key, token_ids)
        assert set(np.flatnonzero(labels != IGNORE)) <= {1, 4}
        assert (input_ids[[0, 2, 3, 5, 6]] == token_ids[[0, 2, 3, 5, 6]]).all()


def test_nothing_to_mask() -> None:
    input_ids, labels = masked(0, np.array([1, 2, 3]))
    assert input_ids.tolist() == [1, 2, 3]
    assert (labels == IGNORE).all()


def test_shares_of_mask_random_and_unchanged() -> None:
    token_ids = np.full(1000, 5)
    rounds = [masked(key, token_ids) for key in range(400)]
    shown = np.concatenate([input_ids[labels != IGNORE] for input_ids, labels in rounds])
    count = len(shown)
    random = shown[(shown != MASK_ID) & (shown != 5)]
    for found, share in ((np.sum(shown == MASK_ID), 0.8), (len(random), 0.1 * 994 / 995), (np.sum(shown == 5), 0.1)):
        assert abs(found - share * count) < 4 * np.sqrt(count * share * (1 - share))
    assert random.min() >= 5
    assert random.max() <= 999
    in_bins, _ = np.histogram(random, bins=7, range=(5, 1000))
    assert np.abs(in_bins - len(random) / 7).max() < 5 * np.sqrt(len(random) / 7)


def test_every_position_is_as_likely() -> None:
    token_ids, hits = np.arange(5, 45), np.zeros(40)
    num_rounds = 4000
    for round_number in range(num_rounds):
        hits += masked(mask_key(0, "sample", round_number), token_ids)[1] != IGNORE
    expected = num_rounds * 6 / 40
    assert np.abs(hits - expected).max() < 4.5 * np.sqrt(expected)


def test_smoothing_prefers_rare_tokens_by_the_expected_ratio() -> None:
    """One token of 1,000 is drawn: its chance is exactly its share of the weights."""
    counts = np.zeros(1000, dtype=np.int64)
    counts[10], counts[11] = 10_000, 100
    weights = token_weights(counts, 0.7)
    token_ids = np.array([10, 10, 10, 11])
    num_draws = 6000
    rare = sum(masked(key, token_ids, weights)[1][3] != IGNORE for key in range(num_draws))
    share = 100**0.7 / (3 + 100**0.7)
    assert abs(rare - share * num_draws) < 4 * np.sqrt(num_draws * share * (1 - share))


def test_no_smoothing_is_uniform_and_uncounted_tokens_count_as_one() -> None:
    assert token_weights(np.array([3, 1, 0]), 0.0) is None
    weights = token_weights(np.array([4, 1, 0]), 0.5)
    assert weights is not None
    assert weights.tolist() == [1.0, 2.0, 2.0]


def test_seed_key_and_round_each_change_the_mask() -> None:
    token_ids = np.arange(5, 205)
    keys = [mask_key(0, "a", 0), mask_key(1, "a", 0), mask_key(0, "b", 0), mask_key(0, "a", 1)]
    assert len({tuple(masked(key, token_ids)[1]) for key in keys}) == 4
    assert (masked(keys[0], token_ids)[0] == masked(mask_key(0, "a", 0), token_ids)[0]).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
def test_a_mask_does_not_depend_on_the_samples_beside_it(smoothing: float) -> None:
    weights = token_weights(np.arange(1000), smoothing)
    samples = [np.arange(5, 45), np.array([1, 2]), np.arange(100, 900, 7), np.empty(0, dtype=np.int64), np.array([9])]
    keys = [mask_key(0, str(number), 0) for number in range(len(samples))]
    alone = [masked(key, sample, weights) for key, sample in zip(keys, samples)]
    line = np.concatenate(samples)
    together = mask_tokens(
        line, line >= 5, [len(sample) for sample in samples], keys=keys, settings=SETTINGS, weights=weights
    )
    for found, expected in zip(together, zip(*alone)):
        assert found.tolist() == np.concatenate(expected).tolist()


def test_equal_ranks_do_not_change_the_number() -> None:
    """Ranks are rounded, so the last of the chosen may share its own with others."""
    rank = np.array([[3, 3, 3, 3, 1, 3], [5, 4, 3, 2, 1, 0]], dtype=np.uint32)
    allowed = np.array([[True, True, False, True, True, True], [True] * 6])
    assert np.flatnonzero(_lowest(rank, allowed, 0.5)).tolist() == [0, 4, 9, 10, 11]
