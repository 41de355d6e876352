"""Closed-form values and gradients against float64 autograd of the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.losses.divergence import DIVERGENCES, Distribution, logits_mse, softmax
from tests import references

KINDS: list[tuple[str, float | None]] = [
    ("forward_kl", None),
    ("reverse_kl", None),
    ("js", 0.5),
    ("js", 0.1),
    ("js", 0.9),
    ("skew_kl", 0.0),
    ("skew_kl", 0.1),
    ("skew_kl", 0.9),
    ("total_variation", None),
]
ROWS, IDS = 12, 300


def log_probabilities(seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """log q and log p, [ROWS, IDS] float64; the first row of p is that of q."""
    generator = torch.Generator().manual_seed(seed)
    z, z_teacher = (torch.randn(ROWS, IDS, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    z_teacher[0] = z[0]
    return torch.log_softmax(z, 1), torch.log_softmax(z_teacher, 1)


def ours(kind: str, parameter: float | None, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Logits may be off by a constant a row; here it is not the same for both."""
    extra = () if parameter is None else (parameter,)
    student, teacher = (
        Distribution(log + shift, log.exp(), torch.full_like(log[:, :1], shift), lambda: torch.empty_like(log_q))
        for log, shift in ((log_q, 0.5), (log_p, -2.0))
    )
    return DIVERGENCES[kind](student, teacher, *extra)


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize(("kind", "parameter"), KINDS)
def test_value_and_gradient_are_those_of_autograd(kind: str, parameter: float | None, spread: float) -> None:
    """In float64 nothing but the formula can differ; a row with q = p is among them."""
    log_q, log_p = log_probabilities(1, spread)
    z = log_q.clone().requires_grad_()
    expected = references.divergence(kind, torch.log_softmax(z, 1), log_p, parameter)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    if kind == "total_variation":  # at q = p to rounding, every sign is an accident
        slope[0] = 0.0
        log_p[0] = log_q[0]
    value, gradient = ours(kind, parameter, log_q, log_p)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "parameter"), KINDS)
def test_finite_and_bounded_where_probabilities_underflow(kind: str, parameter: float | None) -> None:
    """Logits of +-1e4: e^-20000 is 0 in fp32, and every term stays finite with the gradient of its limit."""
    z, z_teacher = torch.zeros(4, 6), torch.zeros(4, 6)
    z[0, 0], z_teacher[0, 0] = 1e4, 1e4  # both sure, of the same
    z[1, 0], z_teacher[1, 1] = 1e4, 1e4  # both sure, of different ids
    z[2, 0], z_teacher[2, 0] = 1e4, -1e4
    z[3, :3], z_teacher[3, 3:] = 1e4, 1e4
    log_q, log_p = torch.log_softmax(z, 1), torch.log_softmax(z_teacher, 1)
    value, gradient = ours(kind, parameter, log_q, log_p)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4), rtol=0, atol=2e-3)  # softmax ignores a constant
    assert value[0].abs() < 1e-7
    assert (gradient[0].abs() < 1e-6).all()
    if kind in ("forward_kl", "skew_kl") and parameter in (None, 0.0):
        assert value[1] == 1e4
        assert gradient[1].tolist() == [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    if kind == "total_variation":
        assert value[1] == 1.0


@pytest.mark.parametrize(("kind", "parameter"), KINDS)
def test_zero_at_equality_and_positive_elsewhere(kind: str, parameter: float | None) -> None:
    log_q, log_p = log_probabilities(2, 1.0)
    value, _ = ours(kind, parameter, log_q, log_p)
    assert value[0].abs() < 1e-12
    assert (value[1:] > 1e-4).all()


def test_limits_of_the_families() -> None:
    """Skew 0 is forward KL; Jensen-Shannon at a half is symmetric and at most log 2."""
    log_q, log_p = log_probabilities(3, 4.0)
    for got, expected in zip(ours("skew_kl", 0.0, log_q, log_p), ours("forward_kl", None, log_q, log_p)):
        torch.testing.assert_close(got, expected)
    there, back = ours("js", 0.5, log_q, log_p)[0], ours("js", 0.5, log_p, log_q)[0]
    torch.testing.assert_close(there, back)
    assert (there <= torch.log(torch.tensor(2.0))).all()


def test_logits_mse_is_the_mean_over_the_vocabulary() -> None:
    z = torch.randn(ROWS, IDS, dtype=torch.float64, requires_grad=True)
    z_teacher = torch.randn(ROWS, IDS, dtype=torch.float64)
    expected = (z - z_teacher).square().mean(1)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    value, gradient = logits_mse(z.detach(), z_teacher, lambda: torch.empty_like(z_teacher))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope)


def test_softmax_is_exact_over_a_large_vocabulary() -> None:
    """torch's own is off by 1e-5 here, more than a gradient may be."""
    logits = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0)) * 4.0
    ours = softmax(logits, logits.amax(1, keepdim=True), lambda: torch.empty_like(logits))
    exact = torch.log_softmax(logits.double(), dim=1)
    assert ((ours.p - exact.exp()).norm() / exact.exp().norm()).item() < 3e-7
    assert (ours.log_p - exact).abs().max().item() < 5e-6
