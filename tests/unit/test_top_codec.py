"""The likeliest ids come back with their probabilities, to the error that is promised, and the mass of the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.cache import bits, levelled
from engine.cache.distribution import Exponentiator
from engine.cache.kept import Kept
from engine.cache.levels import FINE_STEP, FLOOR, Levels
from engine.cache.top import TopCodec

IDS = 3000


def distribution(num_rows: int, spread: float) -> tuple[np.ndarray, Kept, TopCodec]:
    """p [P, V] float64, what a codec keeps of it, and the codec."""
    codec = TopCodec(np.random.default_rng(3).permutation(IDS), max_k=40, min_k=40, p=1.0, max_error=0.05)
    z = torch.randn(num_rows, IDS, generator=torch.Generator().manual_seed(5)) * spread
    teacher = Exponentiator(num_rows, IDS, z.device)(z, torch.zeros(num_rows, dtype=torch.long))
    kept = codec.select(teacher, torch.zeros(num_rows))
    return torch.softmax(z.double(), dim=1).numpy(), kept, codec


def dense(kept: Kept) -> np.ndarray:
    table = np.zeros((kept.num_positions, IDS))
    table[kept.positions, kept.ids] = kept.values
    return table


@pytest.mark.parametrize("spread", [0.2, 2.0, 6.0])
@pytest.mark.parametrize("lengths", [[1], [30], [9, 0, 20, 1]])
def test_records_give_back_what_was_kept(lengths: list[int], spread: float) -> None:
    p, kept, codec = distribution(sum(lengths), spread)
    read = codec.decode([codec.encode(part) for part in kept.cut(lengths)])
    got, inside = dense(read), dense(kept) > 0
    assert np.array_equal(got > 0, inside)
    assert np.array_equal(inside.sum(axis=1), np.full(len(p), 40))
    likely = inside & (p > np.exp(-FLOOR))
    assert np.abs(np.log(got[likely]) - np.log(p[likely])).max() < 0.05 + 0.01, "0.01 for the sum that is made 1"
    assert read.tail is not None
    assert np.abs(got.sum(axis=1) + read.tail - 1.0).max() < 1e-6
    assert np.abs(np.where(inside, 0.0, p).sum(axis=1) - read.tail).max() < 0.06
    assert (p[np.arange(len(p)), read.top_ids] >= p.max(axis=1) * np.exp(-2 * 0.05)).all()


def test_many_positions_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 2^16 of them, and the pieces are put together in order."""
    codec = TopCodec(np.arange(IDS), max_k=2, min_k=2, p=1.0, max_error=0.05)
    chance, num_rows = np.random.default_rng(6), 70_000
    first = chance.integers(0, IDS // 2, num_rows)
    ids = np.stack([first, first + 1 + chance.integers(0, IDS // 2 - 1, num_rows)], axis=1).ravel()
    values = np.tile(np.array([0.5, 0.25], np.float32), num_rows)
    kept = Kept(np.repeat(np.arange(num_rows), 2), ids, values, first, np.full(num_rows, 0.25, np.float32))
    records = [codec.encode(part) for part in kept.cut([20_000, 0, 30_000, 20_000])]
    whole = codec.decode(records)
    assert np.array_equal(whole.positions, kept.positions)
    assert np.array_equal(whole.ids, kept.ids)
    monkeypatch.setattr(levelled, "_PIECE_BYTES", 1)
    pieces = codec.decode(records)
    assert whole.tail is not None
    assert pieces.tail is not None
    for one, other in zip((whole.positions, whole.ids, whole.values, whole.top_ids, whole.tail),
                          (pieces.positions, pieces.ids, pieces.values, pieces.top_ids, pieces.tail)):  # fmt: skip
        assert np.array_equal(one, other)


def test_top_p_keeps_as_few_as_reach_the_mass() -> None:
    codec = TopCodec(np.arange(IDS), max_k=50, min_k=2, p=0.7, max_error=0.05)
    z = torch.randn(60, IDS, generator=torch.Generator().manual_seed(1)) * torch.linspace(1.0, 9.0, 60).unsqueeze(1)
    teacher = Exponentiator(60, IDS, z.device)(z, torch.zeros(60, dtype=torch.long))
    kept = codec.select(teacher, torch.zeros(60))
    sorted_p = torch.softmax(z.double(), dim=1).sort(dim=1, descending=True).values
    needed = (sorted_p.cumsum(dim=1) < 0.7).sum(dim=1) + 1
    counts = np.bincount(kept.positions, minlength=60)
    assert np.array_equal(counts, needed.clamp(2, 50).numpy())
    assert 2 in counts
    assert 50 in counts
    assert kept.tail is not None
    cut = torch.from_numpy(counts)
    mass = torch.where(torch.arange(IDS) < cut.unsqueeze(1), sorted_p, 0.0).sum(dim=1)
    assert np.abs(1.0 - mass.numpy() - kept.tail).max() < 1e-6


@pytest.mark.parametrize("max_error", [0.001, 0.01, 0.1, 0.5])
def test_levels_are_within_the_error_that_is_stated(max_error: float) -> None:
    log_p = -np.linspace(0.0, FLOOR, 20001)
    levels = Levels(max_error)
    error = np.abs(levels.log_p()[levels.of(log_p)] - log_p)
    assert (error <= np.minimum(max_error, 1.3 * FINE_STEP * np.exp(-log_p / 2)) + 1e-6).all()
    highest, lowest = levels.of(np.array([0.0, -1e9])).tolist()
    assert highest == levels.highest
    assert lowest in (0, 1)


def test_a_record_that_was_cut_short_is_refused() -> None:
    _, kept, codec = distribution(20, 2.0)
    record = codec.encode(kept)
    for length in (0, 9, len(record) // 3, len(record) - 1):
        with pytest.raises(ValueError, match="of"):
            codec.decode([record[:length]])


def test_more_ids_than_there_are() -> None:
    codec = TopCodec(np.arange(7), max_k=128, min_k=128, p=1.0, max_error=0.05)
    z = torch.randn(3, 7, generator=torch.Generator().manual_seed(5))
    kept = codec.select(Exponentiator(3, 7, z.device)(z, torch.zeros(3, dtype=torch.long)), torch.zeros(3))
    read = codec.decode([codec.encode(kept)])
    assert np.bincount(read.positions).tolist() == [7, 7, 7]
    assert read.tail is not None
    assert read.tail.max() < 1e-6


def test_numbers_of_several_widths_in_several_strings() -> None:
    chance = np.random.default_rng(0)
    widths = np.array([0, 1, 3, 25, 11])
    counts = chance.integers(0, 30, (4, len(widths)))
    values = [chance.integers(0, 1 << width, count) for row in counts for width, count in zip(widths, row)]
    strings = [
        bits.pack(np.concatenate(values[5 * n : 5 * n + 5]), np.repeat(widths, row)) for n, row in enumerate(counts)
    ]
    assert np.array_equal(bits.unpack(strings, counts, widths), np.concatenate(values))
    with pytest.raises(ValueError, match="of"):
        bits.unpack([strings[0][:-1], *strings[1:]], counts, widths)
