"""Terms against targets of which a cache kept a few ids a position: the student's normaliser and K gathers.

The kept weights w are at the cache's temperature. What they lack to 1, the tail, is handled in one of three ways:

``bucket``: all other ids together are one more outcome, and the two distributions over K + 1 outcomes are compared.
``renormalise``: w / sum w is the whole target.
``residual_to_label``: the tail goes to the data's label.

Sampled targets have no tail: w is itself an unbiased estimate of the whole distribution (arXiv 2503.16870).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.losses.divergence import DIVERGENCES, Distribution, Slope
from engine.schema import SparseTargets

_NOTHING = -100.0
"""Stands for the logarithm of 0: its exponential is 0 in fp32 and it is finite."""


def sparse_term(
    kind: str, parameter: float | None, q: Distribution, targets: SparseTargets, temperature: float, label: Tensor
) -> tuple[Tensor, Slope]:
    """Value of each row, [C], and its slope in the student's scaled logits.

    ``label`` [C, 1] is an id in every row. ``kind`` is a name in DIVERGENCES; all but forward_kl need the bucket.
    """
    if targets.tail is None:
        ids, w, entropy = targets.ids, targets.weights, targets.entropy
    else:
        w, tail = _at_temperature(targets.weights, targets.tail, q.p.shape[1], targets.temperature / temperature)
        if targets.handling == "bucket":
            return _bucket(kind, parameter, q, targets.ids, w, tail.unsqueeze(1))
        if targets.handling == "residual_to_label":
            ids, w = torch.cat([targets.ids, label], dim=1), torch.cat([w, tail.unsqueeze(1)], dim=1)
            entropy = _entropy_of_merged(w, ids, label)
        else:
            ids, w = targets.ids, w / w.sum(dim=1, keepdim=True)
            entropy = -torch.special.xlogy(w, w).sum(dim=1)
    assert kind == "forward_kl", "others are refused before the run begins"
    total = w.sum(dim=1, keepdim=True)
    cross_entropy = (total * q.log_total).squeeze(1) - (w * q.logits.gather(1, ids)).sum(dim=1)
    return cross_entropy - entropy, Slope(q.p, total if targets.importance else None, ids, -w)


def _at_temperature(w: Tensor, tail: Tensor, num_ids: int, exponent: float) -> tuple[Tensor, Tensor]:
    """The kept weights and the tail at another temperature; the tail as if its mass lay evenly over its ids."""
    if exponent == 1.0:
        return w, tail
    num_others = num_ids - (w > 0).sum(dim=1)
    softened = torch.where(w > 0, w.pow(exponent), 0.0)
    rest = num_others * (tail / num_others.clamp_min(1)).pow(exponent)
    total = softened.sum(dim=1) + rest
    return softened / total.unsqueeze(1), rest / total


def _entropy_of_merged(w: Tensor, ids: Tensor, label: Tensor) -> Tensor:
    """Entropy of each row when the last column's weight belongs to ``label``, kept or not."""
    at_label = torch.where(ids == label, w, 0.0).sum(dim=1)
    others = torch.where(ids == label, 0.0, w)
    return -torch.special.xlogy(others, others).sum(dim=1) - torch.special.xlogy(at_label, at_label)


def _bucket(
    kind: str, parameter: float | None, q: Distribution, ids: Tensor, w: Tensor, tail: Tensor
) -> tuple[Tensor, Slope]:
    """Any divergence over K + 1 outcomes.

    With u the student's log-probabilities of the outcomes and g = dL/du (which sums to 0), dL/dz_j is g_j for a kept
    id and g_tail * q_j / q_tail for any other.
    """
    kept = w > 0
    others = q.new()
    others.copy_(q.p).scatter_(1, ids, 0.0)  # 1 - sum of the kept would cancel
    q_tail = others.sum(dim=1, keepdim=True)
    log_q = torch.where(kept, q.logits.gather(1, ids) - q.log_total, _NOTHING)
    student = _outcomes(torch.cat([log_q, q_tail.log().clamp_min(_NOTHING)], dim=1))
    teacher = _outcomes(torch.cat([w, tail], dim=1).log().clamp_min(_NOTHING))
    extra = () if parameter is None else (parameter,)
    value, g = DIVERGENCES[kind](student, teacher, *extra)
    factor = g[:, -1:] / q_tail.clamp_min(1e-37)  # where nothing is left, it multiplies zeros
    return value, Slope(others, factor, ids, torch.where(kept, g[:, :-1], 0.0))


def _outcomes(log_p: Tensor) -> Distribution:
    def new() -> Tensor:
        return torch.empty_like(log_p)

    return Distribution(log_p, log_p.exp(), log_p.new_zeros(log_p.shape[0], 1), new)
