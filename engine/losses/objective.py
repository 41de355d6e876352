"""The objective: a weighted sum of terms, each a sum over positions divided by the step's global number of them.

So the gradient does not depend on how a step is cut into ranks, accumulation and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.terms import AnyTerm, CrossEntropy, LayerTerm, LogitTerm, Ramp, Scheduled
from engine.losses.block import METRICS, LogitLoss
from engine.losses.few import few_classes_loss
from engine.losses.fused import FusedInputs, fused_head_loss
from engine.losses.hidden import select_rows
from engine.losses.layers import LayerComparisons, Shape, over_all_tokens
from engine.schedule import between
from engine.schema import Answer, Batch, Head, SparseTargets, Targets

PROJECTIONS = "objective.projections."
"""What the names of projections begin with in the module that is trained"""


@dataclass(frozen=True)
class StepContext:
    """What a forward needs to know of the step it belongs to."""

    step: int
    num_labels: int
    """labelled positions of the whole step, over all ranks and micro-batches"""
    num_tokens: int
    """real tokens of the whole step"""
    with_metrics: bool = True


class HeadLoss(nn.Module):
    """A module of its own so that ZeRO-3 gathers the head's weight here and nowhere else."""

    def forward(self, hidden: Tensor, head: Head, inputs: FusedInputs) -> tuple[Tensor, Tensor, Tensor]:
        return fused_head_loss(hidden, head, inputs)


class Objective(nn.Module):
    """Raises ConfigError for a layer index that a model does not have."""

    def __init__(
        self, terms: Sequence[AnyTerm], *, num_steps: int, num_ids: int, student: Shape, teacher: Shape | None
    ) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.names = _names(self.terms)
        self.num_steps, self.num_ids = num_steps, num_ids
        self.head_loss = HeadLoss()
        self.logit_terms = [i for i, term in enumerate(self.terms) if not isinstance(term, LayerTerm)]
        self.all_tokens = any(isinstance(t, LogitTerm) and t.restrict_to == "all" for t in self.terms)
        self.comparisons = LayerComparisons(self.terms, student, teacher)
        self.projections = self.comparisons.projections

    @property
    def needs_targets(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(not isinstance(term, CrossEntropy) for term in self.terms)

    @property
    def needs_hidden_states(self) -> bool:
        return self.comparisons.needs_hidden_states

    @property
    def metric_names(self) -> list[str]:
        """Names of the vector that ``forward`` returns; all but the ``*_tokens`` ones are sums over labelled rows."""
        return [f"{name}{suffix}" for suffix in ("", "_weighted") for name in self.names] + list(METRICS)

    @property
    def over_tokens(self) -> list[bool]:
        """For each metric, whether it is a sum over all real tokens instead of the labelled ones."""
        sets = [over_all_tokens(term) for term in self.terms]
        return sets + sets + [False] * len(METRICS)

    def rows(self, batch: Batch) -> Tensor:
        """The positions whose logits are needed, as flat indices [N]."""
        return batch.token_rows if self.all_tokens else batch.label_rows

    def weight(self, index: int, step: int) -> float:
        return self._at(self.terms[index].weight, step)

    def _at(self, value: Scheduled, step: int) -> float:
        if isinstance(value, Ramp):
            end_step = value.to_step or self.num_steps
            return between(value.start, value.end, value.shape, step, value.from_step, end_step)
        return float(value)

    def forward(
        self, answer: Answer, head: Head | None, batch: Batch, targets: Targets | None, context: StepContext
    ) -> tuple[Tensor, Tensor]:
        """The micro-batch's part of the step's loss, and its metric sums.

        Args:
            answer: the student's.
            head: the student's, for a task over the vocabulary.

        Returns:
            Scalar fp32 loss; [len(metric_names)] fp32 sums without gradient.
        """
        assert targets is not None or not (self.needs_targets and torch.is_grad_enabled()), "training needs its targets"
        rows = self.rows(batch)
        num_labels, num_tokens = max(1, context.num_labels), max(1, context.num_tokens)
        losses = [self._logit_loss(i, context.step, num_labels / num_tokens) for i in self.logit_terms]
        inputs = FusedInputs(
            labels=batch.labels.flatten()[rows] if rows.numel() else batch.labels.new_empty(0),
            all_labelled=not self.all_tokens,
            targets=targets,
            losses=losses,
            num_ids=self.num_ids,
            with_metrics=context.with_metrics,
            with_gradient=torch.is_grad_enabled() and bool(losses),
        )
        if answer.head_input is not None:
            total, logit_raw, metrics = self.head_loss(select_rows(answer.head_input, rows), head, inputs)
        else:
            assert answer.logits is not None
            # with no term on logits the head is no part of the graph: a gradient that is undefined breaks DeepSpeed
            logits = answer.logits if losses else answer.logits.detach()
            total, logit_raw, metrics = few_classes_loss(logits, inputs)
        loss = total / num_labels
        raw = list(torch.unbind(logit_raw))
        for i in self.comparisons.indices:
            if targets is None:  # held-out text of a run that knows its teacher from a cache
                raw.insert(i, total.new_zeros(()))
                continue
            assert not isinstance(targets, SparseTargets), "they are refused before the run begins"
            value = self.comparisons.value(i, answer, targets, batch)
            over = num_tokens if over_all_tokens(self.terms[i]) else num_labels
            loss = loss + value * (self.weight(i, context.step) / over)
            raw.insert(i, value.detach())
        weighted = [value * self.weight(i, context.step) for i, value in enumerate(raw)]
        return loss, torch.cat([torch.stack(raw + weighted), metrics])

    def _logit_loss(self, index: int, step: int, labels_per_token: float) -> LogitLoss:
        term = self.terms[index]
        weight = self.weight(index, step)
        if isinstance(term, CrossEntropy):
            return LogitLoss("cross_entropy", weight)
        assert isinstance(term, LogitTerm)
        everywhere = term.restrict_to == "all"
        return LogitLoss(
            kind=term.kind,
            coefficient=weight * labels_per_token if everywhere else weight,
            temperature=self._at(term.temperature, step),
            parameter=getattr(term, "beta", getattr(term, "alpha", None)),
            labelled_only=not everywhere,
        )


def _names(terms: Sequence[AnyTerm]) -> list[str]:
    """The kind of each term; a second one of a kind gets a number."""
    kinds: list[Any] = [term.kind for term in terms]
    return [k if kinds[:i].count(k) == 0 else f"{k}_{kinds[:i].count(k) + 1}" for i, k in enumerate(kinds)]
