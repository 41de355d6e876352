"""Attention maps and relations between values, student against teacher, without a batch of T x T maps.

A relation is softmax(a b^T scale) over the positions that a position may attend to: an attention map for queries and
keys, a value relation for values with themselves. Sequence by sequence the maps of both models are formed, turned into
the gradient of the scores, dS, and multiplied back: da = dS b, db = dS^T a. So memory is that of one sequence's maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.schema import Batch, LayerAttention

KINDS = ("kl", "mse")
_NEVER = -1.0e4
"""Score of a position that is not attended to: no weight, and finite."""


def relation_loss(
    kind: str, student: tuple[Tensor, Tensor, float], teacher: tuple[Tensor, Tensor, float], batch: Batch, causal: bool
) -> Tensor:
    """Sum over the real positions of how their row of the map differs, as the mean over the heads.

    ``kl`` is KL(teacher || student) of a row; ``mse`` the squared difference, as the mean over the row's positions.

    Args:
        student: a and b, [B, heads, T, d] each, and the scale of their products.
        teacher: the same with its own d and as many heads.
    """
    a, b, scale = student
    return _Relation.apply(kind, a, b, scale, teacher, batch.segment_ids, causal)


class _Relation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        a: Tensor,
        b: Tensor,
        scale: float,
        teacher: tuple[Tensor, Tensor, float],
        segment_ids: Tensor,
        causal: bool,
    ) -> Tensor:
        their_a, their_b, their_scale = teacher
        total = torch.zeros((), device=a.device)
        wanted = a.requires_grad or b.requires_grad
        da, db = (torch.zeros_like(each, dtype=torch.float32) if wanted else None for each in (a, b))
        for sequence in range(a.shape[0]):
            segments = segment_ids[sequence]
            forbidden = segments[:, None] != segments[None, :]
            if causal:
                forbidden = forbidden | torch.ones_like(forbidden).triu(1)
            real = (segments != 0).float()
            ours = _log_map(a[sequence], b[sequence], scale, forbidden)
            theirs = _log_map(their_a[sequence], their_b[sequence], their_scale, forbidden)
            value, slope = _compare(kind, ours, theirs, forbidden)
            weight = real / a.shape[1]
            total += (value * weight).sum()
            if da is not None and db is not None:
                slope *= weight[:, None] * scale
                torch.matmul(slope, b[sequence].float(), out=da[sequence])
                torch.matmul(slope.transpose(1, 2), a[sequence].float(), out=db[sequence])
        ctx.gradients = da, db
        ctx.dtypes = a.dtype, b.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        da, db = ctx.gradients
        ctx.gradients = None, None
        if da is None:
            return (None,) * 7
        return None, (da * grad).to(ctx.dtypes[0]), (db * grad).to(ctx.dtypes[1]), None, None, None, None


def _log_map(a: Tensor, b: Tensor, scale: float, forbidden: Tensor) -> Tensor:
    """[heads, T, T] logarithms of the map of one sequence."""
    scores = torch.matmul(a.float(), b.float().transpose(1, 2)).mul_(scale)
    return torch.log_softmax(scores.masked_fill_(forbidden, _NEVER), dim=-1)


def _compare(kind: str, ours: Tensor, theirs: Tensor, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """Value of each row, [heads, T], and the gradient with respect to the scores, [heads, T, T]."""
    p, q = theirs.exp(), ours.exp()
    if kind == "kl":
        return (p * (theirs - ours)).sum(dim=-1), q - p
    num_places = (~forbidden).sum(dim=-1).float()
    gap = q - p
    value = gap.square().sum(dim=-1) / num_places
    slope = gap * (2.0 / num_places[:, None])
    return value, q * (slope - (slope * q).sum(dim=-1, keepdim=True))


def attention_of(layer: LayerAttention) -> tuple[Tensor, Tensor, float]:
    """What makes its maps; a key that several queries share is repeated."""
    shared = layer.query.shape[1] // layer.key.shape[1]
    return layer.query, layer.key.repeat_interleave(shared, dim=1) if shared > 1 else layer.key, layer.scale


def relation_of(layer: LayerAttention, of: str, num_heads: int) -> tuple[Tensor, Tensor, float]:
    """What makes the relation of its ``query``, ``key`` or ``value`` with itself, in ``num_heads`` heads of equal width
    whatever the model's own (MiniLMv2, arXiv 2012.15828)."""
    states: Tensor = getattr(layer, of)
    sequences, _, places, _ = states.shape
    split = states.transpose(1, 2).reshape(sequences, places, num_heads, -1).transpose(1, 2)
    return split, split, split.shape[-1] ** -0.5
