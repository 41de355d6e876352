"""Systematic draws are unbiased and close to the teacher; what is written is what is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.cache import elias_fano, sampled, varints
from engine.cache.codec import Codec
from engine.cache.distribution import Distributions, Exponentiator
from engine.cache.drawing import draw_systematically
from engine.cache.importance import ImportanceCodec
from engine.cache.kept import Kept, joined
from engine.cache.sampled import SampledCodec
from engine.cache.top import TopCodec

IDS = 3000


def logits(num_rows: int, spread: float = 2.0, ids: int = IDS) -> Tensor:
    return torch.randn(num_rows, ids, generator=torch.Generator().manual_seed(5)) * spread


def distributions(z: Tensor) -> Distributions:
    return Exponentiator(len(z), z.shape[1], z.device)(z, torch.zeros(len(z), dtype=torch.long))


def offsets(num_rows: int) -> Tensor:
    return torch.rand(num_rows, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def dense(kept: Kept, ids: int = IDS) -> np.ndarray:
    table = np.zeros((kept.num_positions, ids), np.float32)
    table[kept.positions, kept.ids] = kept.values
    return table


def ranking(ids: int = IDS) -> np.ndarray:
    return np.random.default_rng(3).permutation(ids)


@pytest.mark.parametrize("num_draws", [1, 7, 50])
def test_an_id_is_drawn_as_often_as_its_probability_says(num_draws: int) -> None:
    """The offsets of an even grid stand for all of [0, 1): their mean is the expectation, to the grid's step."""
    z, grid = logits(1), 2000
    p = torch.softmax(z[0].double(), dim=0).numpy()
    even = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    shares = dense(SampledCodec(ranking(), num_draws).select(distributions(z.expand(grid, IDS)), even))
    assert np.abs(shares.sum(axis=1) - 1.0).max() < 1e-5
    assert np.abs(shares.mean(axis=0, dtype=np.float64) - p).max() <= 1.0 / grid / num_draws + 1e-6
    assert np.abs(shares - p).max() < 1.0 / num_draws + 1e-6


def test_draws_are_those_of_the_plain_cumulative_distribution() -> None:
    """Also where whole tiles of ids have no mass at all, first, last or between."""
    z = logits(60, 6.0)
    z[:20, :1500] = -torch.inf
    z[20:40, 700:] = -torch.inf
    z[40:50, 600:2900] = -torch.inf
    chance, num_draws = offsets(60), 40
    cumulative = torch.softmax(z.double(), dim=1).cumsum(dim=1)
    points = (chance.unsqueeze(1) + torch.arange(num_draws)) / num_draws
    plain = torch.searchsorted(cumulative, points, right=True)
    drawn = draw_systematically(distributions(z), chance, num_draws)
    assert (drawn != plain).float().mean() < 1e-3, "but for draws within rounding of a border"
    assert torch.softmax(z, dim=1).gather(1, drawn).min() > 0.0


def test_systematic_draws_have_less_error_than_independent_ones() -> None:
    z, num_draws = logits(200), 50
    p = torch.softmax(z, dim=1)
    systematic = dense(SampledCodec(ranking(), num_draws).select(distributions(z), offsets(200)))
    drawn = torch.multinomial(p, num_draws, replacement=True)
    independent = torch.zeros_like(p).scatter_add_(1, drawn, torch.full(drawn.shape, 1 / num_draws))
    error = [np.square(x - p.numpy()).sum() for x in (systematic, independent.numpy())]
    assert error[0] < 0.8 * error[1]


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("num_draws", [1, 13, 64, 300])
@pytest.mark.parametrize("lengths", [[1], [40], [9, 0, 30, 1]])
def test_records_give_back_their_draws(lengths: list[int], num_draws: int, spread: float) -> None:
    codec, num_rows = SampledCodec(ranking(), num_draws), sum(lengths)
    kept = codec.select(distributions(logits(num_rows, spread)), offsets(num_rows))
    read = codec.decode([codec.encode(part) for part in kept.cut(lengths)])
    assert len(read.ids) == len(kept.ids)
    assert np.array_equal(dense(read), dense(kept))
    assert np.array_equal(read.top_ids, kept.top_ids)


def test_records_decode_alike_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, lengths = SampledCodec(ranking(), 20), [30, 5, 0, 40, 25, 0]
    kept = codec.select(distributions(logits(100)), offsets(100))
    records = [codec.encode(part) for part in kept.cut(lengths)]
    monkeypatch.setattr(sampled, "_PIECE_BYTES", len(records[0]))
    read = codec.decode(records)
    assert np.array_equal(dense(read), dense(kept))
    assert np.array_equal(read.top_ids, kept.top_ids)


@pytest.mark.parametrize("num_draws", [1, 20])
@pytest.mark.parametrize("temperature", [0.8, 0.9, 1.5, 2.0])
def test_weights_of_another_proposal_are_unbiased(temperature: float, num_draws: int) -> None:
    z, grid = logits(1, 3.0), 4000
    p = torch.softmax(z[0].double(), dim=0).numpy()
    even = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    codec = ImportanceCodec(ranking(), num_draws, temperature)
    kept = codec.select(distributions(z.expand(grid, IDS)), even)
    r = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    assert np.abs(dense(kept).mean(axis=0, dtype=np.float64) - p).max() <= (p / r).max() / grid / num_draws + 1e-5
    read = codec.decode([codec.encode(part) for part in kept.cut([grid - 1, 1])])
    got, wanted = dense(read), dense(kept)
    assert np.array_equal(got > 0, wanted > 0)
    assert np.array_equal(read.top_ids, kept.top_ids)
    if num_draws > 1 and temperature < 1.0:
        assert (read.top_ids != read.ids[np.searchsorted(read.positions, np.arange(grid))]).any(), "not the heaviest"
    assert np.abs(np.log(got[got > 0]) - np.log(wanted[wanted > 0])).max() < 0.0101


def test_the_likeliest_id_is_known_wherever_it_must_have_been_drawn() -> None:
    z, num_draws = logits(300, 3.0), 20
    p, likeliest = torch.softmax(z, dim=1).max(dim=1)
    kept = SampledCodec(ranking(), num_draws).select(distributions(z), offsets(300))
    sure = (p >= 1.0 / num_draws).numpy()
    assert 0 < sure.sum() < 300
    assert (kept.top_ids == likeliest.numpy())[sure].all()


def test_ids_past_2_to_the_18th() -> None:
    ids = (1 << 18) + 1000
    shares = np.array([5, 1, 2, 8], np.float32) / 8
    kept = Kept(np.array([0, 0, 0, 1]), np.array([0, 1 << 17, ids - 1, ids - 2]), shares, np.array([0, ids - 2]))
    codec = SampledCodec(np.arange(ids), 8)
    assert np.array_equal(dense(codec.decode([codec.encode(kept)]), ids), dense(kept, ids))


def test_a_long_record_of_rare_ids_needs_more_than_32_bits() -> None:
    ids, num_rows = 1 << 18, 9000
    chance = np.random.default_rng(2).integers(1 << 17, ids, num_rows)
    kept = Kept(np.arange(num_rows), chance, np.ones(num_rows, np.float32), chance)
    codec = SampledCodec(np.arange(ids), 4)
    read = codec.decode([codec.encode(kept)])
    assert np.array_equal(np.sort(read.positions), kept.positions)
    assert np.array_equal(read.ids[np.argsort(read.positions)], chance)


def test_padded_rows_hold_every_pair_once() -> None:
    codec = SampledCodec(ranking(), 30)
    kept = codec.select(distributions(logits(50, 4.0)), offsets(50))
    read = codec.decode([codec.encode(part) for part in kept.cut([20, 30])])
    ids, values = read.padded()
    table = np.zeros((50, IDS), np.float32)
    np.add.at(table, (np.arange(50)[:, None], ids), values)
    assert np.array_equal(table, dense(kept))
    assert all(set(row) == set(read.ids[read.positions == number]) for number, row in enumerate(ids))


@pytest.mark.parametrize("num_positions", [0, 3])
def test_nothing_padded_is_nothing(num_positions: int) -> None:
    nothing = np.empty(0, np.int32)
    ids, values = Kept(nothing, nothing, np.empty(0, np.float32), np.zeros(num_positions, np.int32)).padded()
    assert ids.shape == values.shape == (num_positions, 0)


@pytest.mark.parametrize(
    "codec",
    [
        SampledCodec(ranking(), 3),
        ImportanceCodec(ranking(), 3, 0.8),
        TopCodec(ranking(), max_k=5, min_k=5, p=1.0, max_error=0.05),
    ],
)
def test_no_records_are_nothing(codec: Codec) -> None:
    """So decodes a batch of which every sample was damaged."""
    read = codec.decode([])
    assert read.num_positions == len(read.positions) == len(read.ids) == len(read.values) == 0


def test_padded_rows_past_2_to_the_16th_position() -> None:
    chance = np.random.default_rng(4)
    positions = chance.permutation(np.repeat(np.arange(70_000), 2))
    ids, shares = chance.permutation(len(positions)), chance.random(len(positions), np.float32)
    rows, values = Kept(positions, ids, shares, np.zeros(70_001, np.int64)).padded()
    assert rows.shape == (70_001, 2)
    assert not values[-1].any()
    place = np.empty_like(positions)
    place[ids] = positions
    assert np.array_equal(place[rows[:-1]], np.stack([np.arange(70_000)] * 2, axis=1))
    share = np.empty_like(shares)
    share[ids] = shares
    assert np.array_equal(share[rows[:-1]], values[:-1])


def test_parts_laid_end_to_end_are_the_whole() -> None:
    kept = SampledCodec(ranking(), 30).select(distributions(logits(50)), offsets(50))
    whole = joined(kept.cut([7, 0, 43]))
    assert np.array_equal(dense(whole), dense(kept))


def test_a_record_that_was_cut_short_is_refused() -> None:
    codec = SampledCodec(ranking(), 20)
    record = codec.encode(codec.select(distributions(logits(30)), offsets(30)))
    for length in range(len(record)):
        with pytest.raises(ValueError, match="of"):
            codec.decode([record, record[:length], record])


@pytest.mark.parametrize(
    "numbers", [[], [0], [0, 0, 0], [5, 0, 0, 1 << 40], [127, 128, 0], [0] * 300 + [1] + [0] * 200]
)
def test_whole_numbers_with_runs_of_zeros(numbers: list[int]) -> None:
    content = varints.encode(numbers)
    if numbers:
        assert varints.decode(content + b"\x07", len(numbers)) == (numbers, len(content))
    with pytest.raises(ValueError, match="of"):
        varints.decode(content, len(numbers) + 1)
    assert len(varints.encode([0] * 100)) == 2


def test_lists_of_any_length_and_bound() -> None:
    chance = np.random.default_rng(0)
    for number in range(60):
        lengths = chance.integers(0, 60, number % 9)
        bounds = chance.integers(1, 1 << int(chance.integers(1, 34)), len(lengths))
        lists = [np.sort(chance.integers(0, bound, length)) for bound, length in zip(bounds, lengths)]
        values = np.concatenate([np.empty(0, np.int64), *lists])
        code = elias_fano.encode(values, lengths, bounds)
        twice = elias_fano.decode([code, code], np.stack([lengths, lengths]), np.stack([bounds, bounds]))
        assert np.array_equal(twice, np.concatenate([values, values]))


def test_the_size_is_near_the_information_in_a_random_set() -> None:
    """log2 C(u, n) bits are the least; the code may take 0.6 bits more a number."""
    values = np.sort(np.random.default_rng(1).choice(1 << 26, 1 << 16, replace=False))
    code = elias_fano.encode(values, np.array([len(values)]), np.array([1 << 26]))
    bits = 8 * len(code) / len(values)
    assert 10 + 1.44 < bits < 10 + 1.44 + 0.6
