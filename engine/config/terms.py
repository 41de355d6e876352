"""The terms of the objective, as sections of the run YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config.section import Count, Section


class Ramp(Section):
    """A number that moves from `start` to `end` between two steps, and stays there."""

    start: float
    """Value up to `from_step`."""
    end: float
    """Value from `to_step` on."""
    shape: Literal["linear", "cosine"] = "linear"
    """Straight, or half a cosine wave."""
    from_step: Annotated[int, Field(ge=0)] = 0
    """Step at which it starts to move."""
    to_step: Count | None = None
    """Step at which it arrives. Default: the last."""

    @model_validator(mode="after")
    def _forwards(self) -> Ramp:
        if self.to_step is not None and self.to_step <= self.from_step:
            raise ValueError(f"to_step {self.to_step} is not after from_step {self.from_step}")
        return self


Scheduled = float | Ramp


def _lowest(value: Scheduled) -> float:
    return min(value.start, value.end) if isinstance(value, Ramp) else value


class Term(Section):
    """What every term has."""

    weight: Scheduled = 1.0
    """Factor in the objective, or a ramp."""

    @model_validator(mode="after")
    def _weight_not_negative(self) -> Term:
        if _lowest(self.weight) < 0.0:
            raise ValueError(f"weight is {_lowest(self.weight)} at its lowest; it must not be negative")
        return self


class LogitTerm(Term):
    """What every comparison of the two distributions over the vocabulary has. KD terms are scaled by T^2."""

    temperature: Scheduled = 1.0
    """Divides both models' logits, or a ramp."""
    restrict_to: Literal["masked", "all"] = "masked"
    """`masked`: positions with a label. `all`: every real token (DistilBERT without restrict_ce_to_mask)."""

    @model_validator(mode="after")
    def _temperature_positive(self) -> LogitTerm:
        if _lowest(self.temperature) <= 0.0:
            raise ValueError(f"temperature is {_lowest(self.temperature)} at its lowest; it must be above 0")
        return self


class ForwardKL(LogitTerm):
    """KL(teacher || student): covers all that the teacher does. The usual choice."""

    kind: Literal["forward_kl"]


class ReverseKL(LogitTerm):
    """KL(student || teacher): stays where the teacher is sure."""

    kind: Literal["reverse_kl"]


class JensenShannon(LogitTerm):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student."""

    kind: Literal["js"]
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the teacher in the mixture."""


class SkewKL(LogitTerm):
    """KL(teacher || alpha teacher + (1 - alpha) student), the skewed KL of DistiLLM."""

    kind: Literal["skew_kl"]
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the teacher in the mixture."""


class TotalVariation(LogitTerm):
    """Half the L1 distance of the two distributions."""

    kind: Literal["total_variation"]


class LogitsMSE(LogitTerm):
    """Mean squared difference of the logits over the vocabulary. Temperature does not apply."""

    kind: Literal["logits_mse"]

    @model_validator(mode="after")
    def _no_temperature(self) -> LogitsMSE:
        if self.temperature != 1.0:
            raise ValueError("logits_mse compares raw logits and takes no temperature")
        return self


class CrossEntropy(Term):
    """Cross entropy on the data's own labels: the masked or the next token."""

    kind: Literal["cross_entropy"]


class HiddenTerm(Term):
    """Comparison of hidden states; widths that differ get a trained projection from student to teacher."""

    kind: Literal["hidden_cosine", "hidden_mse"]
    layers: Literal["last", "spread"] | tuple[tuple[int, int], ...] = "last"
    """`last`: the final states. `spread`: each student layer with the teacher layer at the same relative depth.
    Or pairs [student, teacher]; 0 is the embeddings, i the output of the i-th layer."""
    restrict_to: Literal["masked", "all"] = "all"
    """`all`: every real token. `masked`: positions with a label."""


class AttentionTerm(Term):
    """Comparison of attention maps, over the real tokens and as the mean over heads. Both models need as many heads."""

    kind: Literal["attention_kl", "attention_mse"]
    layers: Literal["last", "spread"] | tuple[tuple[int, int], ...] = "last"
    """As for hidden terms; layers count from 1."""


class RelationTerm(Term):
    """KL between the relations of values (or queries, or keys) to each other: softmax(v v^T / sqrt(d)), MiniLM's second
    term. Heads and widths of the two models may differ."""

    kind: Literal["relation_kl"]
    of: tuple[Literal["query", "key", "value"], ...] = ("value",)
    """What is related to itself; the term is the mean over them."""
    heads: Count | None = None
    """Heads of equal width that both models' states are cut into. Default: the student's number of heads."""
    layers: Literal["last", "spread"] | tuple[tuple[int, int], ...] = "last"
    """As for hidden terms; layers count from 1."""


LayerTerm = HiddenTerm | AttentionTerm | RelationTerm
"""Compare layers, not logits."""
AnyTerm = Annotated[
    ForwardKL
    | ReverseKL
    | JensenShannon
    | SkewKL
    | TotalVariation
    | LogitsMSE
    | CrossEntropy
    | HiddenTerm
    | AttentionTerm
    | RelationTerm,
    Field(discriminator="kind"),
]
