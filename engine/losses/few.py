"""Every logit term where there are few classes: the model's own logits, turned into values and gradients in one pass.

The closed forms are those of the fused head; what differs is that the logits exist, [N, C], and autograd goes on
through whatever head the model has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.losses.block import METRICS
from engine.losses.fused import BLOCK_BYTES, FusedInputs, logits_to_gradient
from engine.losses.scratch import Scratch
from engine.schema import LogitTargets


def few_classes_loss(logits: Tensor, inputs: FusedInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows of the weighted logit terms; returns what ``fused_head_loss`` does.

    Args:
        logits: [N, C]; differentiable.
    """
    return _FewClasses.apply(logits, inputs)


class _FewClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: FusedInputs) -> tuple[Tensor, Tensor, Tensor]:
        z = logits.detach().to(torch.float32, copy=True)
        raw = torch.zeros(len(inputs.losses), device=z.device)
        metrics = torch.zeros(len(METRICS), device=z.device)
        teacher = inputs.targets.logits.float() if isinstance(inputs.targets, LogitTargets) else None
        if z.shape[0]:
            rows = min(z.shape[0], max(1, BLOCK_BYTES[z.device.type] // (4 * z.shape[1])))
            scratch = Scratch(rows, z.shape[1], z.device)
            logits_to_gradient(z, teacher, inputs.labels, None, inputs, raw, metrics, scratch)
        total = torch.zeros((), device=z.device)
        for number, loss in enumerate(inputs.losses):
            total += loss.coefficient * raw[number]
        ctx.gradient = z if inputs.with_gradient and inputs.losses else None
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(raw, metrics)
        return total, raw, metrics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, None]:
        if ctx.gradient is None:
            return None, None
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad).to(ctx.dtype), None
