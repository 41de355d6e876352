"""The constraint of FairDistillation: both tokens of a pair get the mean of the teacher's probabilities."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ConfigError
from engine.losses.block import LogitLoss
from engine.losses.fused import FusedInputs, fused_head_loss
from engine.losses.head import even_out
from engine.schema import DenseTargets, Head
from engine.tasks.tokenizer import pair_ids
from tests import references, tiny

PAIRS = torch.tensor([[3, 9], [20, 4]])


def evened(logits: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(logits.double(), dim=1)
    for a, b in PAIRS.tolist():
        p[:, [a, b]] = p[:, [a, b]].mean(dim=1, keepdim=True)
    return p


def test_probabilities_of_pairs_are_evened_and_no_other_moves() -> None:
    torch.manual_seed(0)
    logits = 3.0 * torch.randn(6, 30)
    expected = evened(logits)
    even_out(logits, PAIRS)
    torch.testing.assert_close(torch.softmax(logits.double(), dim=1), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_student_learns_the_evened_distribution(temperature: float) -> None:
    torch.manual_seed(0)
    hidden, teacher = torch.randn(40, 8, requires_grad=True), torch.randn(40, 6)
    head, their_head = Head(torch.randn(30, 8), None), Head(torch.randn(30, 6), None)
    losses = [LogitLoss("forward_kl", 1.0, temperature=temperature)]
    targets = DenseTargets(teacher, their_head, even_pairs=PAIRS)
    labels = torch.zeros(40, dtype=torch.long)
    total, *_ = fused_head_loss(hidden, head, FusedInputs(labels, True, targets, losses, 30, True, True))
    total.backward()
    x = hidden.detach().double().requires_grad_()
    z = references.logits(x, head, 30)
    expected, _ = references.objective(losses, z, evened(references.logits(teacher, their_head, 30)).log(), labels)
    expected.backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), x.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_pairs_by_text_and_by_id_and_pairs_that_are_none() -> None:
    tokenizer = tiny.tokenizer()
    with pytest.raises(ConfigError, match=r"'w2' \(id 7\) is given twice"):
        pair_ids(tokenizer, [("w1", "w2"), (7, "w90")])
    assert pair_ids(tokenizer, [("w1", "w2"), (8, "w90")]) == [[6, 7], [8, 95]]
    with pytest.raises(ConfigError, match="'nobody' is not one token"):
        pair_ids(tokenizer, [("w1", "nobody")])
    with pytest.raises(ConfigError, match="there is no id 96; the tokenizer has 96"):
        pair_ids(tokenizer, [(0, 96)])
