"""The terms the plain way: whole logits in float64, torch's own softmax, autograd. What the closed forms must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.losses.block import LogitLoss
from engine.schema import IGNORE, Head


def term(loss: LogitLoss, z: Tensor, z_teacher: Tensor | None, labels: Tensor) -> Tensor:
    """[N] value of a term a row, with its T^2. Rows without a label give the cross entropy 0."""
    if loss.kind == "cross_entropy":
        return F.cross_entropy(z, labels, reduction="none", ignore_index=IGNORE)
    assert z_teacher is not None
    if loss.kind == "logits_mse":
        return (z - z_teacher).square().mean(dim=1)
    log_q, log_p = (torch.log_softmax(logits / loss.temperature, dim=1) for logits in (z, z_teacher))
    return loss.temperature**2 * divergence(loss.kind, log_q, log_p, loss.parameter)


def divergence(kind: str, log_q: Tensor, log_p: Tensor, parameter: float | None) -> Tensor:
    """[N] straight from the definition."""
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        return (p * (log_p - log_q)).sum(1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(1)
    if kind == "total_variation":
        return 0.5 * (q - p).abs().sum(1)
    assert parameter is not None
    if kind == "js":
        m = parameter * p + (1 - parameter) * q
        return parameter * (p * (log_p - m.log())).sum(1) + (1 - parameter) * (q * (log_q - m.log())).sum(1)
    assert kind == "skew_kl"
    return (p * (log_p - (parameter * p + (1 - parameter) * q).log())).sum(1)


def logits(hidden: Tensor, head: Head, num_ids: int) -> Tensor:
    """[N, num_ids] in float64, differentiable in hidden and the head's tensors."""
    z = hidden.double() @ head.weight[:num_ids].double().t()
    if head.bias is not None:
        z = z + head.bias[:num_ids].double()
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def objective(
    losses: Sequence[LogitLoss], z: Tensor, z_teacher: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted sum over rows (scalar) and the unweighted sum of each term, [len(losses)]."""
    sums = []
    for loss in losses:
        rows = term(loss, z, z_teacher, labels)
        sums.append((rows * (labels != IGNORE) if loss.labelled_only else rows).sum())
    total = sum((loss.coefficient * value for loss, value in zip(losses, sums)), z.new_zeros(()))
    return total, torch.stack(sums) if sums else z.new_zeros(0)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    difference = (ours.double() - theirs.double()).norm()
    return (difference / theirs.double().norm().clamp_min(1e-300)).item()
