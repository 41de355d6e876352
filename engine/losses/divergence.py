"""Closed-form values and gradients of the terms that compare two distributions over the vocabulary.

Each function takes the student's distribution q and the teacher's p at one temperature, [C, V] fp32 with finite
logarithms, and returns its value a row, [C], and the gradient with respect to the student's scaled logits z/T, [C, V].
Closed forms need no graph, so a chunk of logits is read, turned into its gradient and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]


class Distribution(NamedTuple):
    """Probabilities over the vocabulary and their logarithms, [C, V] both."""

    p: Tensor
    log_p: Tensor


def softmax(logits: Tensor) -> Distribution:
    """[C, V] -> the distribution of each row.

    On a CPU torch adds up a row's exponentials one after the other: over 152k ids with a spread of 4 its softmax is
    off by 1.4e-5. Its own sum of the result is pairwise and exact to 1e-7, so the result is divided by that. An exp
    there also costs more than the whole softmax, so the logarithms are taken from the logits; on a GPU each pass over
    the memory counts instead.
    """
    if logits.is_cuda:
        log_p = torch.log_softmax(logits, dim=1)
        return Distribution(log_p.exp(), log_p)
    p = torch.softmax(logits, dim=1)
    p.mul_(p.sum(dim=1, keepdim=True).reciprocal_())
    log_total = logits.amax(dim=1, keepdim=True) - p.amax(dim=1, keepdim=True).log_()
    return Distribution(p, logits - log_total)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """dL/dz from ``slope`` = dL/dq: q * (slope - sum q slope). Overwrites ``slope``."""
    mean = torch.linalg.vecdot(q, slope).unsqueeze(1)
    return slope.sub_(mean).mul_(q)


def _log_mixture(log_q: Tensor, log_p: Tensor, teacher_share: float) -> Tensor:
    """log(share p + (1 - share) q), finite even where both underflow."""
    if teacher_share == 0.0:
        return log_q
    return torch.logaddexp(log_p + math.log(teacher_share), log_q + math.log1p(-teacher_share))


def forward_kl(student: Distribution, teacher: Distribution) -> Result:
    """KL(p || q); dz = q - p."""
    value = torch.linalg.vecdot(teacher.p, teacher.log_p - student.log_p)
    return value, student.p - teacher.p


def reverse_kl(student: Distribution, teacher: Distribution) -> Result:
    """KL(q || p); dz = q (log q - log p - KL)."""
    gap = student.log_p - teacher.log_p
    value = torch.linalg.vecdot(student.p, gap)
    return value, gap.sub_(value.unsqueeze(1)).mul_(student.p)


def js(student: Distribution, teacher: Distribution, beta: float) -> Result:
    """Generalised Jensen-Shannon of GKD, arXiv 2306.13649: beta KL(p || m) + (1 - beta) KL(q || m)."""
    log_m = _log_mixture(student.log_p, teacher.log_p, beta)
    slope = student.log_p - log_m
    to_teacher = torch.linalg.vecdot(teacher.p, teacher.log_p - log_m)
    value = beta * to_teacher + (1 - beta) * torch.linalg.vecdot(student.p, slope)
    return value, _through_softmax(student.p, slope.mul_(1 - beta))


def skew_kl(student: Distribution, teacher: Distribution, alpha: float) -> Result:
    """Skewed KL of DistiLLM, arXiv 2402.03898: KL(p || alpha p + (1 - alpha) q)."""
    if alpha == 0.0:  # q times p/q overflows before it cancels: forward KL's form does not
        return forward_kl(student, teacher)
    log_m = _log_mixture(student.log_p, teacher.log_p, alpha)
    gap = teacher.log_p - log_m
    value = torch.linalg.vecdot(teacher.p, gap)
    slope = gap.exp_().mul_(alpha - 1)  # -(1 - alpha) p / m, bounded by 1/alpha
    return value, _through_softmax(student.p, slope)


def total_variation(student: Distribution, teacher: Distribution) -> Result:
    """Half the L1 distance; the gradient is taken as 0 where p = q."""
    gap = student.p - teacher.p
    return 0.5 * gap.abs().sum(dim=1), _through_softmax(student.p, gap.sign_().mul_(0.5))


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
