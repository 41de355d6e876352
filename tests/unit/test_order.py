"""The data order: every sample in its turn, the same for ever, found without replaying anything."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.data.order import DataOrder
from engine.errors import DataError

SHARDS = [50, 7, 31, 1, 44]
GOLDEN = [(0, 2, 1), (0, 4, 5), (0, 4, 42), (0, 0, 18), (0, 2, 4), (0, 0, 48), (1, 0, 2), (7575, 4, 22)]
"""epoch, shard and index of sequences 0, 1, 2, 3, 4, 131, 132 and 1,000,000: a resumed run relies on these"""


def make_order(seed: int = 3, lanes: int = 4, shuffle_samples: int = 8, shards: list[int] = SHARDS) -> DataOrder:
    return DataOrder(shards, seed=seed, lanes=lanes, shuffle_samples=shuffle_samples)


def epoch_samples(order: DataOrder, epoch: int) -> list[tuple[int, int]]:
    first = epoch * order.sequences_per_epoch
    located = [order.locate(c) for c in range(first, first + order.sequences_per_epoch)]
    assert {location.epoch for location in located} == {epoch}
    return [(location.shard, location.index) for location in located]


@pytest.mark.parametrize("lanes", [1, 4, 7])
@pytest.mark.parametrize("shuffle_samples", [1, 8, 1000])
def test_every_sample_at_most_once_an_epoch(lanes: int, shuffle_samples: int) -> None:
    order = make_order(lanes=lanes, shuffle_samples=shuffle_samples)
    everything = {(shard, index) for shard, size in enumerate(SHARDS) for index in range(size)}
    for epoch in range(3):
        seen = epoch_samples(order, epoch)
        assert len(set(seen)) == len(seen) == sum(SHARDS) // lanes * lanes
        assert set(seen) <= everything


def test_left_over_samples_are_fair_over_epochs() -> None:
    order = make_order(lanes=7)
    num_epochs = 400
    met = Counter(sample for epoch in range(num_epochs) for sample in epoch_samples(order, epoch))
    expected = num_epochs * order.sequences_per_epoch / order.num_samples
    assert len(met) == order.num_samples
    assert min(met.values()) > 0.94 * expected


def test_order_is_what_it_always_was() -> None:
    order = make_order()
    located = [order.locate(c) for c in (0, 1, 2, 3, 4, 131, 132, 10**6)]
    assert [(where.epoch, where.shard, where.index) for where in located] == GOLDEN


@pytest.mark.parametrize("change", [{"seed": 4}, {"lanes": 2}, {"shuffle_samples": 16}])
def test_settings_change_the_order(change: dict[str, int]) -> None:
    assert epoch_samples(make_order(**change), 0)[:40] != epoch_samples(make_order(), 0)[:40]


def test_epochs_differ() -> None:
    order = make_order()
    assert epoch_samples(order, 0) != epoch_samples(order, 1)


def test_any_place_is_found_without_the_ones_before() -> None:
    walked, jumping = make_order(), make_order()
    in_order = [walked.locate(c) for c in range(5 * walked.sequences_per_epoch)]
    for c in (600, 3, 131, 132, 400, 0):
        assert jumping.locate(c) == in_order[c]


def test_lane_shuffles_within_its_windows_only() -> None:
    order = make_order(shards=[100], lanes=2, shuffle_samples=10)
    for lane in range(2):
        for window in range(5):
            offsets = range(10 * window, 10 * window + 10)
            indices = sorted(order.locate(offset * 2 + lane).index for offset in offsets)
            assert indices == [lane * 50 + offset for offset in offsets]


def test_fewer_samples_than_lanes() -> None:
    with pytest.raises(DataError, match=r"5 samples.*data\.lanes = 8"):
        make_order(shards=[5], lanes=8)
