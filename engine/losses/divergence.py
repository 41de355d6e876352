"""Closed-form values and gradients of the terms that compare two distributions over the vocabulary.

Each function takes the student's and the teacher's log-probabilities log q and log p at one temperature, [C, V] fp32
and finite, and returns its value a row, [C], and the gradient with respect to the student's scaled logits z/T, [C, V].
Closed forms need no graph, so a chunk of logits is read, turned into its gradient and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """dL/dz from ``slope`` = dL/dq: q * (slope - sum q slope). Overwrites ``slope``."""
    mean = torch.linalg.vecdot(q, slope).unsqueeze(1)
    return slope.sub_(mean).mul_(q)


def _log_mixture(log_q: Tensor, log_p: Tensor, teacher_share: float) -> Tensor:
    """log(share p + (1 - share) q), finite even where both underflow."""
    if teacher_share == 0.0:
        return log_q
    return torch.logaddexp(log_p + math.log(teacher_share), log_q + math.log1p(-teacher_share))


def forward_kl(log_q: Tensor, log_p: Tensor) -> Result:
    """KL(p || q); dz = q - p."""
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p - log_q)
    return value, log_q.exp().sub_(p)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Result:
    """KL(q || p); dz = q (log q - log p - KL)."""
    q, gap = log_q.exp(), log_q - log_p
    value = torch.linalg.vecdot(q, gap)
    return value, gap.sub_(value.unsqueeze(1)).mul_(q)


def js(log_q: Tensor, log_p: Tensor, beta: float) -> Result:
    """Generalised Jensen-Shannon of GKD, arXiv 2306.13649: beta KL(p || m) + (1 - beta) KL(q || m)."""
    q, p = log_q.exp(), log_p.exp()
    log_m = _log_mixture(log_q, log_p, beta)
    slope = log_q - log_m
    value = beta * torch.linalg.vecdot(p, log_p - log_m) + (1 - beta) * torch.linalg.vecdot(q, slope)
    return value, _through_softmax(q, slope.mul_(1 - beta))


def skew_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Result:
    """Skewed KL of DistiLLM, arXiv 2402.03898: KL(p || alpha p + (1 - alpha) q)."""
    p = log_p.exp()
    log_m = _log_mixture(log_q, log_p, alpha)
    value = torch.linalg.vecdot(p, log_p - log_m)
    slope = (log_p - log_m).exp_().mul_(alpha - 1)  # -(1 - alpha) p / m, bounded by 1/alpha; alpha 0 gives -p/q
    if alpha == 0.0:  # q times p/q overflows before it cancels: use forward KL's form
        return value, log_q.exp().sub_(p)
    return value, _through_softmax(log_q.exp(), slope)


def total_variation(log_q: Tensor, log_p: Tensor) -> Result:
    """Half the L1 distance; the gradient is taken as 0 where p = q."""
    q = log_q.exp()
    gap = q - log_p.exp()
    return 0.5 * gap.abs().sum(dim=1), _through_softmax(q, gap.sign_().mul_(0.5))


def logits_mse(student_logits: Tensor, teacher_logits: Tensor) -> Result:
    """Mean squared difference of raw logits, over the vocabulary. Takes logits, not log-probabilities."""
    gap = student_logits - teacher_logits
    value = torch.linalg.vecdot(gap, gap) / gap.shape[1]
    return value, gap.mul_(2.0 / gap.shape[1])


DIVERGENCES: dict[str, Callable[..., Result]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skew_kl": skew_kl,
    "total_variation": total_variation,
}
