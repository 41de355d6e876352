"""Answers as the SQuAD measures compare them, and the best one that start and end logits allow.

Exact match and F1 by the definition of the SQuAD 1.1 and 2.0 evaluation (Rajpurkar et al., arXiv 1606.05250 and
1806.03822).
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from engine.tasks.scores import Scores

NUM_BEST = 20
MAX_ANSWER_TOKENS = 30
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


class Candidate(NamedTuple):
    """The best answer of one window of a context."""

    question: str
    """its id"""
    text: str
    score: float
    """sum of the logits of its start and its end"""
    no_answer: float
    """the same of the place that stands for none"""
    answers: tuple[str, ...]
    """those of the data; empty where there is none"""


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks."""
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(predicted: str, answer: str) -> float:
    return float(normalise(predicted) == normalise(answer))


def f1(predicted: str, answer: str) -> float:
    """Of the bags of words; 1 where both are empty, 0 where one is."""
    ours, theirs = normalise(predicted).split(), normalise(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    num_same = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * num_same / (len(ours) + len(theirs)) if num_same else 0.0


def best_answer(example: bytes, start_logits: np.ndarray, end_logits: np.ndarray) -> Candidate:
    """The likeliest span of a window; ``example`` is what its sample holds, the logits are [T]."""
    content = json.loads(example)
    first, starts, ends = content["first"], content["starts"], content["ends"]
    places = range(first, first + len(starts))
    score, text = -np.inf, ""
    likely_ends = [place for place in _largest(end_logits) if place in places]
    for start in (place for place in _largest(start_logits) if place in places):
        for end in likely_ends:
            total = float(start_logits[start] + end_logits[end])
            if start <= end < start + MAX_ANSWER_TOKENS and total > score:
                score, text = total, content["context"][starts[start - first] : ends[end - first]]
    return Candidate(content["id"], text, score, float(start_logits[0] + end_logits[0]), tuple(content["answers"]))


def _largest(logits: np.ndarray) -> list[int]:
    return np.argsort(-logits, kind="stable")[:NUM_BEST].tolist()


def choose_answers(candidates: Iterable[Candidate], may_be_none: bool) -> dict[str, str]:
    """One answer a question, over the windows of its context: empty where none scores higher than the likeliest span,
    if the data have such questions."""
    windows: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        windows[candidate.question].append(candidate)
    chosen = {}
    for question, found in windows.items():
        best = max(found, key=lambda candidate: candidate.score)
        none = may_be_none and min(candidate.no_answer for candidate in found) > best.score
        chosen[question] = "" if none else best.text
    return chosen


def answer_scores(candidates: Sequence[Candidate]) -> Scores:
    """Exact match and F1, over the questions; of several right answers the nearest counts."""
    right = {c.question: tuple(filter(normalise, c.answers)) or ("",) for c in candidates}
    chosen = choose_answers(candidates, may_be_none=any(answers == ("",) for answers in right.values()))
    exact = [max(exact_match(chosen[question], answer) for answer in answers) for question, answers in right.items()]
    partial = [max(f1(chosen[question], answer) for answer in answers) for question, answers in right.items()]
    return Scores({"f1": float(np.mean(partial)), "exact_match": float(np.mean(exact))})
