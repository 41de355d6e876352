"""What predictions on labelled data are worth, in the field's own measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LabelScore:
    """Of one class, or of one type of entity."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """how often it occurs in the data"""


@dataclass(frozen=True)
class Scores:
    """Shares from 0 to 1."""

    measures: dict[str, float]
    """by name; the first is the one that the task is judged by"""
    by_label: tuple[LabelScore, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """rows are the labels of the data, columns those predicted"""
    confusion_labels: tuple[str, ...] = field(default=())

    @property
    def main(self) -> tuple[str, float]:
        return next(iter(self.measures.items()))


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Scores:
    """Of spans in IOB tags, one list a sentence: the definition of conlleval (CoNLL-2000), as seqeval has it."""
    from seqeval.metrics import classification_report
    from seqeval.metrics.sequence_labeling import accuracy_score

    report = classification_report(gold, predicted, output_dict=True, zero_division=0)
    micro: dict[str, Any] = report["micro avg"]
    entities = [(label, row) for label, row in report.items() if not label.endswith(" avg")]
    types = sorted({_type_of(tag) for tags in (*gold, *predicted) for tag in tags})
    return Scores(
        measures={
            "f1": float(micro["f1-score"]),
            "precision": float(micro["precision"]),
            "recall": float(micro["recall"]),
            "accuracy": float(accuracy_score(gold, predicted)),
        },
        by_label=tuple(
            LabelScore(
                label, float(row["precision"]), float(row["recall"]), float(row["f1-score"]), int(row["support"])
            )
            for label, row in entities
        ),
        confusion=_confusion(
            [_type_of(tag) for tags in gold for tag in tags],
            [_type_of(tag) for tags in predicted for tag in tags],
            types,
        ),
        confusion_labels=tuple(types),
    )


def class_scores(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Scores:
    """Of one class a sequence."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    precision, recall, f1, support = precision_recall_fscore_support(
        gold, predicted, labels=list(labels), zero_division=0
    )
    rows = zip(labels, precision.tolist(), recall.tolist(), f1.tolist(), support.tolist())
    return Scores(
        measures={"accuracy": float(accuracy_score(gold, predicted)), "macro_f1": float(f1.mean())},
        by_label=tuple(LabelScore(label, p, r, f, int(number)) for label, p, r, f, number in rows),
        confusion=_confusion(gold, predicted, labels),
        confusion_labels=tuple(labels),
    )


def _type_of(tag: str) -> str:
    """PER of B-PER."""
    return tag[2:] if tag[:2] in ("B-", "I-", "E-", "S-") else tag


def _confusion(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    from sklearn.metrics import confusion_matrix

    return tuple(tuple(row) for row in confusion_matrix(gold, predicted, labels=list(labels)).tolist())
