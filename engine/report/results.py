"""What was measured of the models once a run had ended; kept as results.json, so that the report can be made again."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import CheckpointError
from engine.tasks.scores import LabelScore, Scores

RESULTS = "results.json"

BATCH_SEQUENCES = 32
"""Of the larger of the two batches that a forward pass is timed with."""

Role = Literal["teacher", "control", "student"]


@dataclass(frozen=True)
class ModelResult:
    """One model on the held-out text. None is what was not measured."""

    name: str
    role: Role
    """control: the student's twin that was trained without a teacher"""
    num_parameters: int
    weight_bytes: int
    loss: float | None = None
    """cross entropy, nats a token"""
    perplexity: float | None = None
    agreement: float | None = None
    """share of positions where its likeliest word is the teacher's"""
    latency_seconds: float | None = None
    """of a forward pass over one sequence"""
    batch_seconds: float | None = None
    """of a forward pass over BATCH_SEQUENCES"""
    tokens_per_second: float | None = None
    """in such a batch"""
    scores: Scores | None = None
    """in the measures of a task with labels of its own"""

    @property
    def quality(self) -> float | None:
        """What the task is judged by, the higher the better; None where that is the loss."""
        return None if self.scores is None else self.scores.main[1]


@dataclass(frozen=True)
class Word:
    """A guess at a position."""

    text: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """One position of a held-out text, and what each model would put there."""

    before: str
    """the text up to the position"""
    truth: str
    after: str
    """the text that follows; empty for a causal model, which does not see it"""
    guesses: dict[str, tuple[Word, ...]]
    """for each model's name its likeliest words, best first"""


@dataclass(frozen=True)
class Results:
    """All that the report shows beyond the records made while training."""

    models: tuple[ModelResult, ...]
    predictions: tuple[Prediction, ...] = ()
    origins: tuple[tuple[str, str], ...] = ()
    """each group of the student's weights, and where it came from"""
    num_heldout_tokens: int | None = None
    """positions that loss, perplexity and agreement are measured on"""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what a task with labels of its own is measured by."""
        return next((tuple(model.scores.measures) for model in self.models if model.scores), ())

    def model(self, role: Role) -> ModelResult | None:
        return next((model for model in self.models if model.role == role), None)

    @property
    def by_label(self) -> list[tuple[str, int, list[LabelScore | None]]]:
        """Each label, how often it occurs, and its score by each model that has scores."""
        tables = [{row.label: row for row in model.scores.by_label} for model in self.models if model.scores]
        labels = dict.fromkeys(label for table in tables for label in table)
        rows = [(label, [table.get(label) for table in tables]) for label in labels]
        return [(label, max(row.support for row in found if row), found) for label, found in rows]

    @property
    def retained(self) -> float | None:
        """The student's share of the teacher's quality, for a task with labels of its own."""
        student, teacher = self.model("student"), self.model("teacher")
        if student is None or teacher is None or student.quality is None or not teacher.quality:
            return None
        return student.quality / teacher.quality

    def save(self, run_folder: Path) -> None:
        """Raises CheckpointError when the folder cannot be written."""
        write_whole(run_folder / RESULTS, json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(run_folder: Path) -> Results | None:
        """None when there are none. Raises CheckpointError when the file is damaged."""
        path = run_folder / RESULTS
        try:
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"cannot read {path} ({error}); delete it and evaluate again") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one. Raises CheckpointError when the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; make the run folder writable") from error


def _from_json(stored: dict[str, Any]) -> Results:
    return Results(
        models=tuple(_model(model) for model in stored["models"]),
        predictions=tuple(
            Prediction(
                prediction["before"],
                prediction["truth"],
                prediction["after"],
                {name: tuple(Word(**word) for word in words) for name, words in prediction["guesses"].items()},
            )
            for prediction in stored["predictions"]
        ),
        origins=tuple((group, source) for group, source in stored["origins"]),
        num_heldout_tokens=stored["num_heldout_tokens"],
    )


def _model(stored: dict[str, Any]) -> ModelResult:
    scores = stored.pop("scores", None)
    if scores is None:
        return ModelResult(**stored)
    by_label = tuple(LabelScore(**row) for row in scores["by_label"])
    confusion = tuple(tuple(row) for row in scores["confusion"])
    return ModelResult(
        **stored, scores=Scores(scores["measures"], by_label, confusion, tuple(scores["confusion_labels"]))
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
