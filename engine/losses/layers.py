"""The terms that compare layers: which layers, through which projections, and their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config.terms import AnyTerm, AttentionTerm, HiddenTerm, LayerTerm, RelationTerm
from engine.errors import ConfigError
from engine.losses.hidden import HIDDEN_LOSSES, layer_pairs, select_rows
from engine.losses.relations import attention_of, relation_loss, relation_of
from engine.schema import Answer, Batch, DenseTargets, LogitTargets

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shape:
    """What the terms must know of a model."""

    width: int
    num_layers: int
    num_heads: int = 0


def over_all_tokens(term: AnyTerm) -> bool:
    """Whether a term is a sum over all real tokens instead of the labelled ones."""
    return isinstance(term, AttentionTerm | RelationTerm) or getattr(term, "restrict_to", "masked") == "all"


class LayerComparisons:
    """The projections belong to whoever trains them.

    Raises ConfigError for a layer that a model does not have, or heads that do not fit.
    """

    def __init__(self, terms: Sequence[AnyTerm], student: Shape, teacher: Shape | None) -> None:
        self._terms = {i: term for i, term in enumerate(terms) if isinstance(term, LayerTerm)}
        self._student, self._teacher = student, teacher
        self.pairs: dict[int, Pairs] = {}
        self.projections = nn.ModuleDict()
        for i, term in self._terms.items():
            assert teacher is not None, "terms that compare layers without a teacher are refused while resolving"
            self.pairs[i] = _checked_pairs(i, term, student, teacher)
            if isinstance(term, HiddenTerm):
                if student.width != teacher.width:
                    for number in range(len(self.pairs[i])):
                        self.projections[f"{i}_{number}"] = nn.Linear(student.width, teacher.width, bias=False)
            else:
                _check_heads(i, term, student, teacher)

    @property
    def indices(self) -> list[int]:
        """Of these terms among all."""
        return list(self._terms)

    @property
    def needs_hidden_states(self) -> bool:
        return any(isinstance(term, HiddenTerm) for term in self._terms.values())

    def attention_layers(self, side: int) -> tuple[int, ...]:
        """Layers (from 0) whose attention terms look at, of the student (0) or the teacher (1)."""
        found = {
            pair[side] - 1
            for i, term in self._terms.items()
            if not isinstance(term, HiddenTerm)
            for pair in self.pairs[i]
        }
        return tuple(sorted(found))

    def value(self, index: int, student: Answer, teacher: DenseTargets | LogitTargets, batch: Batch) -> Tensor:
        """Mean over the pairs of layers of the sum over the positions."""
        term, pairs = self._terms[index], self.pairs[index]
        total = torch.zeros((), device=batch.input_ids.device)
        for number, pair in enumerate(pairs):
            if isinstance(term, HiddenTerm):
                total = total + self._hidden(term, f"{index}_{number}", pair, student, teacher, batch)
            else:
                total = total + self._attention(term, pair, student, teacher, batch)
        return total / len(pairs)

    def _hidden(
        self,
        term: HiddenTerm,
        name: str,
        pair: tuple[int, int],
        student: Answer,
        teacher: DenseTargets | LogitTargets,
        batch: Batch,
    ) -> Tensor:
        rows = batch.token_rows if over_all_tokens(term) else batch.label_rows
        ours = select_rows(student.hidden_states[pair[0]], rows)
        if name in self.projections:
            ours = self.projections[name](ours)
        return HIDDEN_LOSSES[term.kind](ours, select_rows(teacher.hidden_states[pair[1]], rows))

    def _attention(
        self,
        term: AttentionTerm | RelationTerm,
        pair: tuple[int, int],
        student: Answer,
        teacher: DenseTargets | LogitTargets,
        batch: Batch,
    ) -> Tensor:
        ours = student.attention[self.attention_layers(0).index(pair[0] - 1)]
        theirs = teacher.attention[self.attention_layers(1).index(pair[1] - 1)]
        kind, causal = term.kind.rpartition("_")[2], ours.causal
        if isinstance(term, AttentionTerm):
            return relation_loss(kind, attention_of(ours), attention_of(theirs), batch, causal)
        heads = term.heads or self._student.num_heads
        sides = [(relation_of(ours, of, heads), relation_of(theirs, of, heads)) for of in term.of]
        return torch.stack([relation_loss(kind, *both, batch, causal) for both in sides]).mean()


def _checked_pairs(index: int, term: LayerTerm, student: Shape, teacher: Shape) -> Pairs:
    try:
        pairs = layer_pairs(term.layers, student.num_layers, teacher.num_layers)
    except IndexError as out_of_range:
        name, layer, highest = out_of_range.args
        raise ConfigError(
            f"losses.{index}.layers: the {name} has no layer {layer}; 0 is its embeddings, {highest} its last layer"
        ) from None
    if not isinstance(term, HiddenTerm) and any(0 in pair for pair in pairs):
        raise ConfigError(f"losses.{index}.layers: the embeddings (0) have no attention; layers count from 1")
    return pairs


def _check_heads(index: int, term: AttentionTerm | RelationTerm, student: Shape, teacher: Shape) -> None:
    if isinstance(term, AttentionTerm):
        if student.num_heads != teacher.num_heads:
            raise ConfigError(
                f"losses.{index} ({term.kind}): the student has {student.num_heads} heads, the teacher "
                f"{teacher.num_heads}, and maps are compared head by head; use relation_kl with heads: "
                f"{student.num_heads}"
            )
        return
    heads = term.heads or student.num_heads
    for name, shape in (("student", student), ("teacher", teacher)):
        if shape.width % heads:
            raise ConfigError(f"losses.{index}.heads: {heads} does not divide the {name}'s width {shape.width}")
