"""What tasks are measured by on held-out data."""

from __future__ import annotations

MEASURES = {
    "masked_lm": ("loss",),
    "causal_lm": ("loss",),
    "token_classification": ("f1", "precision", "recall", "accuracy", "loss"),
    "sequence_classification": ("accuracy", "macro_f1", "loss"),
    "question_answering": ("f1", "exact_match", "loss"),
}
"""Of each task; the first is the one that it is judged by"""

MEASURE_NAMES = {"f1": "F1", "macro_f1": "macro F1", "exact_match": "exact match"}


def measure_name(measure: str) -> str:
    """As a reader writes it."""
    return MEASURE_NAMES.get(measure, measure)
