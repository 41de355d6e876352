"""Closed-form values and gradients of the terms that compare two distributions over the vocabulary.

Each function takes the student's distribution q and the teacher's p at one temperature, [C, V] fp32 with finite
logarithms, and returns its value a row, [C], and the gradient with respect to the student's scaled logits z/T, [C, V].
Closed forms need no graph, so a chunk of logits is read, turned into its gradient and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]
New = Callable[[], Tensor]


class Slope(NamedTuple):
    """dL/dz of each row: ``row_factor`` times ``base``, plus ``amounts`` at ``ids``."""

    base: Tensor
    """[C, V], not to be written to"""
    row_factor: Tensor | None = None
    """[C, 1]"""
    ids: Tensor | None = None
    """[C, K]; one that occurs twice in a row counts twice"""
    amounts: Tensor | None = None
    """[C, K]"""


class Distribution:
    """Probabilities ``p`` over the vocabulary, [C, V], of ``logits`` already divided by the temperature.

    The logarithms are a pass over memory each, so they are formed only for a term that needs them all. ``new`` gives
    memory of the shape of ``logits``.
    """

    def __init__(self, logits: Tensor, p: Tensor, log_total: Tensor, new: New) -> None:
        self.logits, self.p, self.log_total, self.new = logits, p, log_total, new
        """log p = logits - log_total, [C, 1]"""

    @cached_property
    def log_p(self) -> Tensor:
        return torch.sub(self.logits, self.log_total, out=self.new())

    def log_p_at(self, index: Tensor) -> Tensor:
        """log p of one id a row; ``index`` is [C, 1]."""
        return (self.logits.gather(1, index) - self.log_total).squeeze(1)


def softmax(logits: Tensor, peak: Tensor, new: New) -> Distribution:
    """[C, V] -> the distribution of each row; ``peak`` is the largest logit of each, [C, 1].

    On a CPU torch adds up a row's exponentials one after the other: over 152k ids with a spread of 4 its softmax is
    off by 1.4e-5. Its own sum of the result is pairwise and exact to 1e-7, so the result is divided by that.
    """
    p = torch.softmax(logits, dim=1, out=new())
    if not logits.is_cuda:
        p.mul_(p.sum(dim=1, keepdim=True).reciprocal_())
    return Distribution(logits, p, peak - p.amax(dim=1, keepdim=True).log_(), new)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """dL/dz from ``slope`` = dL/dq: q * (slope - sum q slope). Overwrites ``slope``."""
    mean = torch.linalg.vecdot(q, slope).unsqueeze(1)
    return slope.sub_(mean).mul_(q)


def _log_mixture(student: Distribution, teacher: Distribution, teacher_share: float) -> Tensor:
    """log(share p + (1 - share) q), finite even where both underflow."""
    if teacher_share == 0.0:
        return student.log_p
    log_p = torch.add(teacher.log_p, math.log(teacher_share), out=teacher.new())
    log_q = torch.add(student.log_p, math.log1p(-teacher_share), out=student.new())
    return torch.logaddexp(log_p, log_q, out=log_q)


def forward_kl_value(student: Distribution, teacher: Distribution, gap: Tensor) -> Tensor:
    """KL(p || q) of each row without the logarithms: sum p (z_p - z_q), less the difference of the log totals.

    Overwrites ``gap``, [C, V].
    """
    torch.sub(teacher.logits, student.logits, out=gap)
    return torch.linalg.vecdot(teacher.p, gap) - (teacher.log_total - student.log_total).squeeze(1)


def forward_kl(student: Distribution, teacher: Distribution) -> Result:
    """KL(p || q); dz = q - p."""
    gap = student.new()
    value = forward_kl_value(student, teacher, gap)
    return value, torch.sub(student.p, teacher.p, out=gap)


def reverse_kl(student: Distribution, teacher: Distribution) -> Result:
    """KL(q || p); dz = q (log q - log p - KL)."""
    gap = torch.sub(student.log_p, teacher.log_p, out=student.new())
    value = torch.linalg.vecdot(student.p, gap)
    return value, gap.sub_(value.unsqueeze(1)).mul_(student.p)


def js(student: Distribution, teacher: Distribution, beta: float) -> Result:
    """Generalised Jensen-Shannon of GKD, arXiv 2306.13649: beta KL(p || m) + (1 - beta) KL(q || m)."""
    log_m = _log_mixture(student, teacher, beta)
    slope = torch.sub(teacher.log_p, log_m, out=student.new())
    to_teacher = torch.linalg.vecdot(teacher.p, slope)
    torch.sub(student.log_p, log_m, out=slope)
    value = beta * to_teacher + (1 - beta) * torch.linalg.vecdot(student.p, slope)
    return value, _through_softmax(student.p, slope.mul_(1 - beta))


def skew_kl(student: Distribution, teacher: Distribution, alpha: float) -> Result:
    """Skewed KL of DistiLLM, arXiv 2402.03898: KL(p || alpha p + (1 - alpha) q)."""
    if alpha == 0.0:  # q times p/q overflows before it cancels: forward KL's form does not
        return forward_kl(student, teacher)
    log_m = _log_mixture(student, teacher, alpha)
    gap = torch.sub(teacher.log_p, log_m, out=log_m)
    value = torch.linalg.vecdot(teacher.p, gap)
    slope = gap.exp_().mul_(alpha - 1)  # -(1 - alpha) p / m, bounded by 1/alpha
    return value, _through_softmax(student.p, slope)


def total_variation(student: Distribution, teacher: Distribution) -> Result:
    """Half the L1 distance; the gradient is taken as 0 where p = q."""
    gap = torch.sub(student.p, teacher.p, out=student.new())
    return 0.5 * torch.linalg.vector_norm(gap, ord=1, dim=1), _through_softmax(student.p, gap.sign_().mul_(0.5))


def logits_mse(student_logits: Tensor, teacher_logits: Tensor, new: New) -> Result:
    """Mean squared difference of raw logits, over the vocabulary. Takes logits, not log-probabilities."""
    gap = torch.sub(student_logits, teacher_logits, out=new())
    value = torch.linalg.vecdot(gap, gap) / gap.shape[1]
    return value, gap.mul_(2.0 / gap.shape[1])


DIVERGENCES: dict[str, Callable[..., Result]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "skew_kl": skew_kl,
    "total_variation": total_variation,
}
