"""Systematic draws are unbiased and close to the teacher; what is written is what is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.cache import elias_fano
from engine.cache.sampled import Draws, SampledCodec, draw_systematically

IDS = 3000


def probabilities(num_rows: int, spread: float = 2.0, ids: int = IDS) -> Tensor:
    z = torch.randn(num_rows, ids, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * spread
    return torch.softmax(z, dim=1)


def dense_counts(draws: Draws, ids: int = IDS) -> np.ndarray:
    table = np.zeros((draws.num_positions, ids), np.int64)
    table[draws.positions, draws.ids] = draws.counts
    return table


def ranking(ids: int = IDS) -> np.ndarray:
    return np.random.default_rng(3).permutation(ids)


@pytest.mark.parametrize("num_draws", [1, 7, 50])
def test_an_id_is_drawn_as_often_as_its_probability_says(num_draws: int) -> None:
    """The offsets of an even grid stand for all of [0, 1): their mean is the expectation, to the grid's step."""
    p, grid = probabilities(1), 2000
    offsets = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    counts = dense_counts(draw_systematically(p.expand(grid, IDS), offsets, num_draws))
    assert (counts.sum(axis=1) == num_draws).all()
    assert np.abs(counts.mean(axis=0) - num_draws * p[0].numpy()).max() <= 1.0 / grid + 1e-9
    assert np.abs(counts - num_draws * p[0].numpy()).max() < 1.0 + 1e-9


def test_systematic_draws_have_less_error_than_independent_ones() -> None:
    p, num_draws = probabilities(200), 50
    systematic = dense_counts(draw_systematically(p, torch.rand(200), num_draws)) / num_draws
    drawn = torch.multinomial(p, num_draws, replacement=True)
    independent = torch.zeros_like(p).scatter_add_(1, drawn, torch.full(drawn.shape, 1 / num_draws, dtype=p.dtype))
    error = [np.square(x - p.numpy()).sum() for x in (systematic, independent.numpy())]
    assert error[0] < 0.8 * error[1]


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("num_draws", [1, 13, 64, 300])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_a_record_gives_back_its_draws(num_rows: int, num_draws: int, spread: float) -> None:
    draws = draw_systematically(probabilities(num_rows, spread), torch.rand(num_rows), num_draws)
    codec = SampledCodec(ranking(), num_draws)
    read = codec.decode(codec.encode(draws))
    assert len(read.ids) == len(draws.ids)
    assert np.array_equal(dense_counts(read), dense_counts(draws))


def test_ids_past_2_to_the_18th() -> None:
    ids = (1 << 18) + 1000
    draws = Draws(2, np.array([0, 0, 0, 1]), np.array([0, 1 << 17, ids - 1, ids - 2]), np.array([5, 1, 2, 8]))
    codec = SampledCodec(np.arange(ids), 8)
    read = codec.decode(codec.encode(draws))
    assert np.array_equal(dense_counts(read, ids), dense_counts(draws, ids))


def test_a_record_that_was_cut_short_is_refused() -> None:
    draws = draw_systematically(probabilities(30), torch.rand(30), 20)
    codec = SampledCodec(ranking(), 20)
    record = codec.encode(draws)
    for length in (0, 5, len(record) // 8):
        with pytest.raises(ValueError, match="of"):
            codec.decode(record[:length])


def test_lists_of_any_length_and_bound() -> None:
    chance = np.random.default_rng(0)
    for number in range(60):
        lengths = chance.integers(0, 60, number % 9)
        bounds = chance.integers(1, 1 << int(chance.integers(1, 34)), len(lengths))
        lists = [np.sort(chance.integers(0, bound, length)) for bound, length in zip(bounds, lengths)]
        values = np.concatenate([np.empty(0, np.int64), *lists])
        content = elias_fano.encode(values, lengths, bounds)
        read, num_bytes = elias_fano.decode(content + b"\xff\xff", lengths, bounds)
        assert np.array_equal(read, values)
        assert num_bytes == len(content)


def test_the_size_is_near_the_information_in_a_random_set() -> None:
    """log2 C(u, n) bits are the least; the code may take 0.6 bits more a number."""
    values = np.sort(np.random.default_rng(1).choice(1 << 26, 1 << 16, replace=False))
    bits = 8 * len(elias_fano.encode(values, np.array([len(values)]), np.array([1 << 26]))) / len(values)
    assert 10 + 1.44 < bits < 10 + 1.44 + 0.6
