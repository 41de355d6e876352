"""Measures of labelled tasks on cases worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.tasks.scores import class_scores, entity_scores
from engine.tasks.squad import Candidate, answer_scores, best_answer, choose_answers, exact_match, f1, normalise


def test_entities_count_whole_or_not_at_all() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "I-ORG"]]
    predicted = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "O"]]
    scores = entity_scores(gold, predicted)
    assert scores.main == ("f1", pytest.approx(2 / 3))
    assert scores.measures["precision"] == pytest.approx(2 / 3)
    assert scores.measures["accuracy"] == pytest.approx(6 / 7)
    rows = {row.label: row for row in scores.by_label}
    assert (rows["ORG"].f1, rows["PER"].f1, rows["ORG"].support) == (0.0, 1.0, 1)
    table = dict(zip(scores.confusion_labels, scores.confusion))
    assert table["ORG"][scores.confusion_labels.index("O")] == 1


def test_an_entity_that_begins_inside_is_one_as_conlleval_has_it() -> None:
    assert entity_scores([["O", "I-PER"]], [["O", "B-PER"]]).measures["f1"] == 1.0


def test_classes() -> None:
    scores = class_scores(["a", "b", "b", "c"], ["a", "b", "c", "c"], ["a", "b", "c"])
    assert scores.main == ("accuracy", 0.75)
    assert scores.measures["macro_f1"] == pytest.approx((1.0 + 2 / 3 + 2 / 3) / 3)
    assert scores.confusion == ((1, 0, 0), (0, 1, 1), (0, 0, 1))


def test_answers_are_compared_without_articles_case_and_punctuation() -> None:
    assert normalise("The  Cat's, a-b") == "cats ab"
    assert exact_match("the Normans.", "normans") == 1.0
    assert f1("in the city of Paris", "Paris") == pytest.approx(2 * 1 / (4 + 1))
    assert (f1("", ""), f1("", "x"), f1("the", "")) == (1.0, 0.0, 1.0)


def test_the_best_answer_over_windows_and_the_nearest_of_several() -> None:
    candidates = [
        Candidate("q1", "wrong", 1.0, 0.0, ("right", "all right")),
        Candidate("q1", "right", 2.0, 0.0, ("right", "all right")),
        Candidate("q2", "in old Rome", 3.0, 0.5, ("Rome",)),
    ]
    scores = answer_scores(candidates)
    assert scores.measures["exact_match"] == 0.5
    assert scores.main == ("f1", pytest.approx((1.0 + 0.5) / 2))


def test_no_answer_is_given_where_every_window_finds_none_likelier() -> None:
    candidates = [
        Candidate("none", "guess", 1.0, 2.0, ()),
        Candidate("one window doubts", "Rome", 1.0, 2.0, ("Rome",)),
        Candidate("one window doubts", "Rome", 1.5, 1.0, ("Rome",)),
    ]
    assert choose_answers(candidates, may_be_none=True) == {"none": "", "one window doubts": "Rome"}
    assert answer_scores(candidates).measures["exact_match"] == 1.0
    assert choose_answers(candidates[:1], may_be_none=False) == {"none": "guess"}


def test_spans_lie_in_the_context_in_order_and_are_not_long() -> None:
    context = "Rome was built"
    example = {"id": "q", "first": 3, "starts": [0, 5, 9], "ends": [4, 8, 14], "context": context, "answers": ["Rome"]}
    starts, ends = np.full(8, -5.0), np.full(8, -5.0)
    starts[[0, 1, 4]] = 3.0, 9.0, 2.0  # nowhere, in the question, "was"
    ends[[0, 3, 5]] = 1.0, 6.0, 4.0  # nowhere, before the start, "built"
    found = best_answer(json.dumps(example).encode(), starts, ends)
    assert (found.text, found.score, found.no_answer) == ("was built", 6.0, 4.0)
