"""Logit terms where there are few classes: values, gradients, and what is compared at start-up."""

from __future__ import annotations

import pytest
import torch

from engine.losses.block import LogitLoss
from engine.losses.few import few_classes_loss
from engine.losses.fused import FusedInputs
from engine.schema import LogitTargets
from tests import references

TERMS = [
    LogitLoss("cross_entropy", 0.5),
    LogitLoss("forward_kl", 2.0, temperature=2.0),
    LogitLoss("reverse_kl", 0.3),
    LogitLoss("js", 0.7, temperature=1.5, parameter=0.4),
    LogitLoss("logits_mse", 0.9),
]


def inputs(losses: list[LogitLoss], labels: torch.Tensor, teacher: torch.Tensor, grad: bool = True) -> FusedInputs:
    return FusedInputs(labels, True, LogitTargets(teacher), losses, 0, True, grad)


@pytest.mark.parametrize("classes", [2, 9, 384])
def test_value_and_gradient_are_those_of_autograd(classes: int) -> None:
    torch.manual_seed(classes)
    z = torch.randn(50, classes, requires_grad=True)
    teacher, labels = 2.0 * torch.randn(50, classes), torch.randint(classes, (50,))
    total, raw, metrics = few_classes_loss(z, inputs(TERMS, labels, teacher))
    (total * 4.0).backward()
    x = z.detach().double().requires_grad_()
    expected, sums = references.objective(TERMS, x, teacher.double(), labels)
    (expected * 4.0).backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(raw.double(), sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), x.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
    agreement = (z.argmax(1) == teacher.argmax(1)).sum()
    assert metrics[3] == agreement


def test_no_rows_and_no_gradient() -> None:
    nothing = few_classes_loss(
        torch.empty(0, 3, requires_grad=True), inputs(TERMS, torch.empty(0, dtype=torch.long), torch.empty(0, 3))
    )
    assert nothing[0] == 0.0
    nothing[0].backward()
    z = torch.randn(4, 3)
    before = z.clone()
    few_classes_loss(z, inputs(TERMS, torch.zeros(4, dtype=torch.long), torch.randn(4, 3), grad=False))
    assert torch.equal(z, before), "the model's logits are not written to"


def test_half_precision_logits_give_a_gradient_of_their_own_type() -> None:
    z = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    total, *_ = few_classes_loss(z, inputs(TERMS[:1], torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)))
    total.backward()
    assert total.dtype == torch.float32
    assert z.grad is not None
    assert z.grad.dtype == torch.bfloat16
