"""The head and every logit term in one pass over chunks of positions: logits of a whole batch never exist.

A chunk of student logits is formed, turned into its gradient in place, and multiplied back: dH = dZ W, dW += dZ^T H.
That is the arithmetic of the plain way, 6 N V H FLOPs (+ 2 N V G for the teacher), with memory for one chunk, dW and
dH. The gradient is formed unscaled, in units of one position, and **both** dH and dW are multiplied by the incoming
gradient in backward: the fp16 loss scale and the accumulation arrive there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.losses.block import METRICS, Block, LogitLoss, Teacher
from engine.losses.head import even_out, head_logits
from engine.losses.scratch import Scratch
from engine.schema import DenseTargets, Head, SparseTargets, Targets, map_tensors

CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}
"""Size of one chunk of fp32 logits: large enough for a full-speed GEMM, small against dW."""
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 40}
"""Elementwise work goes in blocks of rows, so many a thread, that stay in the caches; a GPU takes the chunk whole."""


@dataclass(frozen=True)
class FusedInputs:
    """All that is not differentiated."""

    labels: Tensor
    """[N] int64, IGNORE where there is none"""
    all_labelled: bool
    targets: Targets | None
    losses: Sequence[LogitLoss]
    num_ids: int
    """ids of the tokenizer; head rows past it are padding"""
    with_metrics: bool
    with_gradient: bool


def fused_head_loss(hidden: Tensor, head: Head, inputs: FusedInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over positions of the weighted logit terms.

    Args:
        hidden: [N, H] states that go into the student's head.
        head: the student's head.

    Returns:
        The sum (scalar fp32, differentiable in hidden, head.weight and head.bias); the unweighted sum of each term,
        [len(losses)]; and METRICS, [4]. The last two carry no gradient.
    """
    return _FusedHead.apply(hidden, head.weight, head.bias, head, inputs)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, inputs: FusedInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, num_ids = hidden.device, inputs.num_ids
        raw = torch.zeros(len(inputs.losses), device=device)
        metrics = torch.zeros(len(METRICS), device=device)
        d_hidden = d_weight = d_bias = None
        if inputs.with_gradient:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=device) if weight.requires_grad else None
            d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None
        row_bytes = 4 * num_ids
        num_rows = hidden.shape[0] if inputs.losses or inputs.with_metrics else 0
        chunk_rows = min(num_rows, max(16, CHUNK_BYTES[device.type] // row_bytes))
        # one buffer each for all chunks: on a CPU memory that is new costs a page fault for every 4 KiB
        shape = (chunk_rows, num_ids)
        student_buffer = torch.empty(shape, device=device)
        dense = inputs.targets if isinstance(inputs.targets, DenseTargets) else None
        teacher_buffer = torch.empty(shape, device=device) if dense is not None else None
        num_threads = torch.get_num_threads() if device.type == "cpu" else 1
        block_rows = num_threads * max(1, BLOCK_BYTES[device.type] // row_bytes)
        scratch = Scratch(min(chunk_rows, block_rows), num_ids, device)
        for start in range(0, num_rows, max(1, chunk_rows)):
            rows = slice(start, start + chunk_rows)
            h = hidden[rows]
            logits = head_logits(h, head, num_ids, out=student_buffer[: h.shape[0]])
            teacher = _rows(inputs.targets, rows) if isinstance(inputs.targets, SparseTargets) else None
            if dense is not None and teacher_buffer is not None:
                teacher = head_logits(dense.hidden[rows], dense.head, num_ids, out=teacher_buffer[: h.shape[0]])
                if dense.even_pairs is not None:
                    even_out(teacher, dense.even_pairs)
            logits_to_gradient(logits, teacher, inputs.labels[rows], head, inputs, raw, metrics, scratch)
            if d_hidden is None:
                continue
            if d_bias is not None:
                d_bias[:num_ids] += logits.sum(dim=0)
            dz = logits.to(h.dtype)
            d_hidden[rows] = dz @ weight[:num_ids]
            if d_weight is not None:
                _add_product(d_weight[:num_ids], dz.t(), h)
            del dz  # the next chunk's must not lie beside it
        total = torch.zeros((), device=device)
        for number, loss in enumerate(inputs.losses):  # Python scalars: a tensor of them would make the host wait
            total += loss.coefficient * raw[number]
        ctx.gradients = d_hidden, d_weight, d_bias
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        ctx.mark_non_differentiable(raw, metrics)
        return total, raw, metrics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.gradients
        if d_hidden is None:  # hidden terms alone: the head takes no part
            return None, None, None, None, None
        ctx.gradients = None, None, None
        weight_dtype, bias_dtype = ctx.dtypes
        if d_hidden.dtype == torch.float32:
            d_hidden = d_hidden.mul_(grad)
        else:  # a loss scale times a small 1/num_targets: multiply before rounding
            d_hidden = (d_hidden.float() * grad).to(d_hidden.dtype)
        d_weight = d_weight.mul_(grad).to(weight_dtype) if d_weight is not None else None
        d_bias = d_bias.mul_(grad).to(bias_dtype) if d_bias is not None else None
        return d_hidden, d_weight, d_bias, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in fp32 whatever the dtype of ``a`` and ``b``."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total += torch.mm(a, b)


def _rows(teacher: Teacher, rows: slice) -> Teacher:
    if isinstance(teacher, SparseTargets):
        return map_tensors(teacher, lambda tensor: tensor[rows])
    return None if teacher is None else teacher[rows]


def logits_to_gradient(
    logits: Tensor,
    teacher: Teacher,
    labels: Tensor,
    head: Head | None,
    inputs: FusedInputs,
    raw: Tensor,
    metrics: Tensor,
    scratch: Scratch,
) -> None:
    """Replace ``logits`` by the gradient of the weighted sum, add to ``raw`` and ``metrics``. All are overwritten.

    Without a ``head`` the gradient is that of the logits themselves.
    """
    for start in range(0, logits.shape[0], scratch.max_rows):
        rows = slice(start, start + scratch.max_rows)
        z = logits[rows]
        scratch.begin(z.shape[0])
        block = Block(z, _rows(teacher, rows), labels[rows], inputs.all_labelled, scratch.new)
        gradient = block.add_terms(inputs.losses, raw, inputs.with_gradient)
        if inputs.with_metrics:
            metrics += block.metrics()
        if gradient is None:
            continue
        if head is not None and head.softcap is not None:
            gradient.mul_(z.div(head.softcap).square_().neg_().add_(1.0))
        if head is not None and head.scale != 1.0:
            gradient.mul_(head.scale)
        z.copy_(gradient)
