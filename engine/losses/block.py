"""The elementwise work on a block of logits: the value and the gradient of every logit term, and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine.losses.divergence import DIVERGENCES, Distribution, New, Slope, forward_kl_value, logits_mse, softmax
from engine.losses.sparse import sparse_term
from engine.schema import IGNORE, SparseTargets

METRICS = ("student_nll", "teacher_nll", "kl_temperature_1", "agreement")
"""Sums over the labelled rows, formed only when asked for; teacher ones are 0 without targets."""


Teacher = Tensor | SparseTargets | None
"""Logits [C, V], or what a cache kept"""


@dataclass(frozen=True)
class LogitLoss:
    """One logit term of this step."""

    kind: str
    """a name in DIVERGENCES, logits_mse or cross_entropy"""
    coefficient: float
    """weight times the ratio of the step's normalisers; T^2 comes on top"""
    temperature: float = 1.0
    parameter: float | None = None
    """beta of js, alpha of skew_kl"""
    labelled_only: bool = True
    """rows without a label take no part"""


class Logits:
    """One model's logits of a block, [C, V], and its distributions, each formed once."""

    def __init__(self, z: Tensor, new: New) -> None:
        self.z, self._new = z, new
        self._at: dict[float, Distribution] = {}

    @cached_property
    def peak(self) -> Tensor:
        return self.z.amax(dim=1, keepdim=True)

    def at(self, temperature: float) -> Distribution:
        if temperature not in self._at:
            scaled, peak = self.z, self.peak
            if temperature != 1.0:
                scaled, peak = torch.div(self.z, temperature, out=self._new()), self.peak / temperature
            self._at[temperature] = softmax(scaled, peak, self._new)
        return self._at[temperature]


class Block:
    """Some rows: the student's logits, what is known of the teacher, and the labels."""

    def __init__(self, z: Tensor, teacher: Teacher, labels: Tensor, all_labelled: bool, new: New) -> None:
        self.student = Logits(z, new)
        self.sparse = teacher if isinstance(teacher, SparseTargets) else None
        self.teacher = Logits(teacher, new) if isinstance(teacher, Tensor) else None
        self.labelled = None if all_labelled else labels != IGNORE
        self.label = (labels if self.labelled is None else labels.clamp_min(0)).unsqueeze(1)
        """[C, 1]: an id in every row"""
        self._new = new

    def add_terms(self, losses: Sequence[LogitLoss], raw: Tensor, with_gradient: bool) -> Tensor | None:
        """Add each term's unweighted sum to ``raw``. Returns dL/dz of the weighted terms, [C, V], if there are any."""
        total: Tensor | None = None
        for number, loss in enumerate(losses):
            if loss.kind != "cross_entropy" and self.teacher is None and self.sparse is None:
                continue  # held-out text of a run that knows its teacher from a cache
            t = loss.temperature
            value, slope = self._term(loss)
            mask = self.labelled if loss.labelled_only else None
            raw[number] += (value if mask is None else value * mask).sum() * (t * t)
            if with_gradient:
                factor = loss.coefficient * t  # d(T^2 f(z/T))/dz = T f'(z/T)
                total = self._added(total, slope, factor if mask is None else mask.unsqueeze(1) * factor)
        return total

    def _added(self, total: Tensor | None, slope: Slope, weight: float | Tensor) -> Tensor:
        on_base = weight if slope.row_factor is None else slope.row_factor * weight
        if total is None:
            total = torch.mul(slope.base, on_base, out=self._new())
        elif isinstance(on_base, Tensor):
            total.addcmul_(slope.base, on_base)
        else:
            total.add_(slope.base, alpha=on_base)
        if slope.ids is not None and slope.amounts is not None:
            total.scatter_add_(1, slope.ids, slope.amounts * weight)
        return total

    def _term(self, loss: LogitLoss) -> tuple[Tensor, Slope]:
        student = self.student.at(loss.temperature)
        if loss.kind == "cross_entropy":
            minus_one = student.p.new_full((1, 1), -1.0).expand_as(self.label)
            return -student.log_p_at(self.label), Slope(student.p, None, self.label, minus_one)
        if self.sparse is not None:
            return sparse_term(loss.kind, loss.parameter, student, self.sparse, loss.temperature, self.label)
        assert self.teacher is not None
        if loss.kind == "logits_mse":
            value, gradient = logits_mse(self.student.z, self.teacher.z, self._new)
        else:
            extra = () if loss.parameter is None else (loss.parameter,)
            value, gradient = DIVERGENCES[loss.kind](student, self.teacher.at(loss.temperature), *extra)
        return value, Slope(gradient)

    def metrics(self) -> Tensor:
        """METRICS of these rows, [4]."""
        student = self.student.at(1.0)
        nothing = torch.zeros(self.label.shape[0], device=self.label.device)
        rows = [-student.log_p_at(self.label), nothing, nothing, nothing]
        if self.sparse is not None:
            rows[1:] = self._sparse_metrics(student, self.sparse)
        elif self.teacher is not None:
            both = self._new()
            rows[1] = -self.teacher.at(1.0).log_p_at(self.label)
            rows[2] = forward_kl_value(student, self.teacher.at(1.0), both)
            peaks = self.student.peak + self.teacher.peak  # on a CPU an argmax costs twelve times as much
            torch.add(self.student.z, self.teacher.z, out=both)
            rows[3] = (both.amax(dim=1, keepdim=True) == peaks).squeeze(1).float()
        table = torch.stack(rows)
        return (table if self.labelled is None else table * self.labelled).sum(dim=1)

    def _sparse_metrics(self, student: Distribution, targets: SparseTargets) -> list[Tensor]:
        kl = sparse_term("forward_kl", None, student, targets, 1.0, self.label)[0]
        agrees = self.student.z.gather(1, targets.top_ids.unsqueeze(1)) == self.student.peak
        return [targets.nll, kl if targets.temperature == 1.0 else torch.zeros_like(kl), agrees.squeeze(1).float()]
