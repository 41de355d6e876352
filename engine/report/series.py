"""From records to curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.tracking.records import Record

MAX_POINTS = 400
PHASES = ("data", "teacher", "student", "optimizer")


@dataclass(frozen=True)
class Series:
    """A metric over the steps. Arrays are [P] float64; where points were merged, low and high are their extremes."""

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray

    merged: bool = False

    def __len__(self) -> int:
        return len(self.steps)


def series(records: Sequence[Record], name: str) -> Series:
    """The metric where it is finite, in at most MAX_POINTS points: more are merged, so that a long run stays small."""
    pairs = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    if len(points) <= MAX_POINTS:
        return Series(points[:, 0], points[:, 1], points[:, 1], points[:, 1])
    starts = np.linspace(0, len(points), MAX_POINTS, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], len(points))
    values = points[:, 1]
    means = np.add.reduceat(values, starts) / (ends - starts)
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return Series(points[ends - 1, 0], means, low, high, merged=True)


def metric_names(records: Sequence[Record], group: str) -> list[str]:
    """Names in ``group`` (``loss``), without it, in the order in which they first appear."""
    prefix = group + "/"
    found = dict.fromkeys(name for record in records for name in record if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in found]


def last_value(records: Sequence[Record], name: str) -> float | None:
    return next((record[name] for record in reversed(records) if isinstance(record.get(name), (int, float))), None)


def step_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Mean seconds a step in each phase, and ``rest``: evaluations, checkpoints and the wait for them.

    The first record is left out when there are others: it holds the warm-up. The rest comes from the wall clock,
    and is missing when the records do not have it.
    """
    timed = [record for record in records if any(isinstance(record.get(f"seconds/{p}"), float) for p in PHASES)]
    timed = timed[1:] if len(timed) > 2 else timed
    seconds = {phase: [record.get(f"seconds/{phase}") for record in timed] for phase in PHASES}
    means = {phase: float(np.mean(found)) for phase, values in seconds.items() if (found := _present(values))}
    clock = [(r["step"], r["time/elapsed_seconds"]) for r in timed if isinstance(r.get("time/elapsed_seconds"), float)]
    if len(clock) > 1 and clock[-1][0] > clock[0][0]:
        whole = (clock[-1][1] - clock[0][1]) / (clock[-1][0] - clock[0][0])
        means["rest"] = max(0.0, whole - sum(means.values()))
    return means


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
