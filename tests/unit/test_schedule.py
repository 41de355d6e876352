"""Learning rates and ramps as functions of the step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from engine.schedule import between, learning_rate_factor, ramp
from engine.state import TrainState

DEFAULTS: dict[str, Any] = {
    "warmup_steps": 0, "final_fraction": 0.0, "decay_steps": None, "milestones": (), "factor": 0.1
}  # fmt: skip


def factors(kind: str, num_steps: int, **settings: Any) -> list[float]:
    options = DEFAULTS | settings
    return [learning_rate_factor(kind, step, num_steps, **options) for step in range(num_steps)]


KINDS = ["linear", "cosine", "constant", "wsd", "multi_step", "plateau"]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_evenly_to_the_peak_and_no_step_is_wasted_on_zero(kind: str) -> None:
    got = factors(kind, 20, warmup_steps=4, milestones=(15,), decay_steps=5)
    assert got[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(got) == 1.0


def test_linear_falls_evenly() -> None:
    assert factors("linear", 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert factors("linear", 6, warmup_steps=2, final_fraction=0.2)[2:] == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_is_half_way_at_half_time_and_flat_at_both_ends() -> None:
    got = factors("cosine", 100, final_fraction=0.1)
    assert got[50] == pytest.approx(0.55)
    assert got[0] == 1.0
    assert got[99] == pytest.approx(0.1, abs=1e-3)
    assert got[1] - got[0] == pytest.approx(0.0, abs=1e-3)
    assert all(later < earlier for earlier, later in pairwise(got))


def test_wsd_is_flat_and_then_falls_linearly() -> None:
    assert factors("wsd", 10, decay_steps=4) == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25])
    assert factors("wsd", 20)[17:] == pytest.approx([1.0, 1.0, 0.5])  # a tenth of the run
    assert factors("wsd", 4)[3:] == pytest.approx([1.0])  # at least one step


def test_multi_step_falls_at_each_milestone() -> None:
    assert factors("multi_step", 6, milestones=(2, 5), factor=0.5) == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.5, 0.25])


@pytest.mark.parametrize("kind", ["constant", "plateau"])
def test_constant(kind: str) -> None:
    assert factors(kind, 5) == [1.0] * 5


def test_plateau_cuts_after_evaluations_without_a_better_one_and_has_a_floor() -> None:
    state = TrainState()
    losses = [3.0, 2.0, 2.0, 2.5, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0]
    found = []
    for loss in losses:
        state.note_evaluation(loss, patience=2, factor=0.5, floor=0.2)
        found.append(state.plateau_factor)
    assert found == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]
    assert state.best_loss == 1.9
    assert TrainState.from_dict(state.to_dict()) == state


def test_a_nan_evaluation_is_never_the_best() -> None:
    state = TrainState()
    state.note_evaluation(float("nan"), patience=5, factor=0.5, floor=0.0)
    state.note_evaluation(2.0, patience=5, factor=0.5, floor=0.0)
    assert state.best_loss == 2.0


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_ramps_stay_at_their_ends(shape: str) -> None:
    assert [ramp(shape, progress) for progress in (-1.0, 0.0, 0.5, 1.0, 2.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    values = [between(2.0, 4.0, shape, step, 10, 20) for step in (0, 10, 15, 20, 99)]
    assert values == pytest.approx([2.0, 2.0, 3.0, 4.0, 4.0])
    assert between(1.0, 0.0, shape, 5, 5, 5) == 1.0  # no length: still a number
