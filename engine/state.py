"""All that moves while a run goes on and is not in the weights: a few plain numbers, saved with every checkpoint."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass
class TrainState:
    """Position and history of a run, the same on every rank."""

    step: int = 0
    """optimizer steps done; the next step has this number"""
    num_tokens: int = 0
    """real tokens trained on, over all ranks"""
    num_bad_samples: int = 0
    """damaged records met, over all ranks"""
    num_resumes: int = 0
    elapsed_seconds: float = 0.0
    """time in training over all sessions of the run"""
    best_loss: float | None = None
    """lowest held-out loss so far"""
    plateau_evaluations: int = 0
    """evaluations since then, for the plateau schedule"""
    plateau_factor: float = 1.0
    best_value: float | None = None
    """of the measure that decides about an early stop"""
    best_step: int | None = None
    """where it was reached"""
    evaluations_since_best: int = 0
    stopped_early: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> TrainState:
        return TrainState(**content)

    def note_measure(self, measure: str, value: float, patience: int) -> bool:
        """Whether ``value`` is the best so far; after ``patience`` evaluations without a better one the run ends."""
        if is_better(measure, value, self.best_value):
            self.best_value, self.best_step, self.evaluations_since_best = value, self.step, 0
            return True
        self.evaluations_since_best += 1
        self.stopped_early = self.evaluations_since_best >= patience
        return False

    def note_evaluation(self, loss: float, *, patience: int, factor: float, floor: float) -> None:
        """Keep the best held-out loss, and cut the plateau factor after ``patience`` evaluations without a better."""
        if loss < (math.inf if self.best_loss is None else self.best_loss):
            self.best_loss, self.plateau_evaluations = loss, 0
            return
        self.plateau_evaluations += 1
        if self.plateau_evaluations >= patience:
            self.plateau_evaluations = 0
            self.plateau_factor = max(floor, self.plateau_factor * factor)


def is_better(measure: str, value: float, best: float | None) -> bool:
    """A loss gets better by falling, every other measure by rising."""
    if best is None:
        return True
    return value < best if measure == "loss" else value > best


def rng_state() -> dict[str, Any]:
    """This rank's generators: what dropout needs to go on as if nothing had happened."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def fresh_rng_state(seed: int, rank: int, step: int) -> dict[str, Any]:
    """For a rank that has none of its own, since the checkpoint is of another number of ranks."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()[:7], "big")
    state: dict[str, Any] = {"cpu": torch.Generator().manual_seed(number).get_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.Generator(torch.device("cuda")).manual_seed(number).get_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
