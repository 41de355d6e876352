"""Sequences of about one length in one step, and epochs that end early: still every sample in its turn."""

from __future__ import annotations

import numpy as np
import pytest

from engine.data.order import DataOrder

COUNTS = (37, 51, 12)


def lengths(shard: int) -> np.ndarray:
    return np.random.default_rng(shard).integers(1, 200, COUNTS[shard])


def order(**changes: object) -> DataOrder:
    settings: dict[str, object] = {"seed": 3, "lanes": 4, "shuffle_samples": 16, "sort_samples": 8, "lengths": lengths}
    return DataOrder(COUNTS, **(settings | changes))  # type: ignore[arg-type]


def met(which: DataOrder, epoch: int) -> list[tuple[int, int]]:
    first = epoch * which.sequences_per_epoch
    places = [which.locate(first + sequence) for sequence in range(which.sequences_per_epoch)]
    assert {place.epoch for place in places} == {epoch}
    return [(place.shard, place.index) for place in places]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_each_sample_once(epoch: int) -> None:
    found = met(order(), epoch)
    assert len(set(found)) == len(found) == 100


def test_steps_are_of_about_one_length_and_the_lengths_of_steps_are_mixed() -> None:
    def spread(which: DataOrder) -> tuple[float, np.ndarray]:
        table = np.array([lengths(shard)[index] for shard, index in met(which, 0)]).reshape(-1, 4)
        return float((table.max(axis=1) - table.mean(axis=1)).mean()), table.mean(axis=1)

    (padded, means), (plain, _) = spread(order()), spread(order(sort_samples=0))
    assert padded < 0.6 * plain
    assert np.abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.5, "long steps do not all come at one end"


def test_the_order_is_the_same_from_any_step_on_and_another_in_each_epoch() -> None:
    assert [order().locate(place) for place in (57, 12, 199)] == [order().locate(place) for place in (57, 12, 199)]
    assert met(order(), 0) != met(order(), 1)
    assert met(order(), 0) != met(order(seed=4), 0)


def test_short_epochs_visit_all_samples_in_turns() -> None:
    short = order(epoch_samples=20, sort_samples=0)
    assert short.sequences_per_epoch == 20
    seen = [place for epoch in range(5) for place in met(short, epoch)]
    assert len(set(met(short, 0))) == 20
    assert len(set(seen)) > 50
    assert order(epoch_samples=1).sequences_per_epoch == 4, "each lane has one"
    assert order(epoch_samples=1000).sequences_per_epoch == 100
