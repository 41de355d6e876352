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

from engine.losses.divergence import DIVERGENCES, Distribution, logits_mse, softmax
from engine.losses.head import head_logits
from engine.schema import IGNORE, DenseTargets, Head

METRICS = ("student_nll", "teacher_nll", "kl_temperature_1", "agreement")
"""Sums over the labelled rows, formed only when asked for; teacher ones are 0 without targets."""
CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}
"""Size of one chunk of fp32 logits: large enough for a full-speed GEMM, small against dW."""
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 40}
"""Elementwise work goes in blocks of rows that stay in a core's cache; a GPU takes the chunk whole."""


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


@dataclass(frozen=True)
class FusedInputs:
    """All that is not differentiated."""

    labels: Tensor
    """[N] int64, IGNORE where there is none"""
    all_labelled: bool
    targets: DenseTargets | None
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
        chunk_rows = max(16, CHUNK_BYTES[device.type] // row_bytes)
        num_rows = hidden.shape[0] if inputs.losses or inputs.with_metrics else 0
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            h = hidden[rows]
            logits = head_logits(h, head, num_ids)
            teacher = head_logits(inputs.targets.hidden[rows], inputs.targets.head, num_ids) if inputs.targets else None
            _logits_to_gradient(logits, teacher, inputs.labels[rows], head, inputs, raw, metrics)
            if d_hidden is None:
                continue
            if d_bias is not None:
                d_bias[:num_ids] += logits.sum(dim=0)
            dz = logits.to(h.dtype)
            d_hidden[rows] = dz @ weight[:num_ids]
            if d_weight is not None:
                _add_product(d_weight[:num_ids], dz.t(), h)
            del logits, teacher, dz  # the next chunk's must not lie beside them
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


def _logits_to_gradient(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    head: Head,
    inputs: FusedInputs,
    raw: Tensor,
    metrics: Tensor,
) -> None:
    """Replace ``logits`` by the gradient of the weighted sum, add to ``raw`` and ``metrics``. All are overwritten."""
    block_rows = max(1, BLOCK_BYTES[logits.device.type] // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        z = logits[rows]
        gradient = _block_gradient(z, None if teacher is None else teacher[rows], labels[rows], inputs, raw, metrics)
        if not inputs.with_gradient:
            continue
        if head.softcap is not None:
            gradient.mul_(z.div(head.softcap).square_().neg_().add_(1.0))
        if head.scale != 1.0:
            gradient.mul_(head.scale)
        z.copy_(gradient)


def _block_gradient(
    z: Tensor, z_teacher: Tensor | None, labels: Tensor, inputs: FusedInputs, raw: Tensor, metrics: Tensor
) -> Tensor:
    """Gradient of the weighted terms with respect to the student's final logits, [C, V]."""
    labelled = None if inputs.all_labelled else (labels != IGNORE)
    index = (labels if labelled is None else labels.clamp_min(0)).unsqueeze(1)
    student: dict[float, Distribution] = {}
    teacher: dict[float, Distribution] = {}
    total: Tensor | None = None
    for number, loss in enumerate(inputs.losses):
        t = loss.temperature
        if loss.kind != "logits_mse" and t not in student:
            student[t] = softmax(z if t == 1.0 else z / t)
        if loss.kind == "cross_entropy":
            value, gradient = _cross_entropy(student[t], index)
        elif loss.kind == "logits_mse":
            assert z_teacher is not None
            value, gradient = logits_mse(z, z_teacher)
        else:
            assert z_teacher is not None
            if t not in teacher:
                teacher[t] = softmax(z_teacher if t == 1.0 else z_teacher / t)
            extra = () if loss.parameter is None else (loss.parameter,)
            value, gradient = DIVERGENCES[loss.kind](student[t], teacher[t], *extra)
        if loss.labelled_only and labelled is not None:
            value, gradient = value * labelled, gradient.mul_(labelled.unsqueeze(1))
        raw[number] += value.sum() * (t * t)
        if inputs.with_gradient:  # d(T^2 f(z/T))/dz = T f'(z/T)
            factor = loss.coefficient * t
            total = gradient.mul_(factor) if total is None else total.add_(gradient, alpha=factor)
    if inputs.with_metrics:
        metrics += _metrics(z, z_teacher, index, labelled, student.get(1.0), teacher.get(1.0))
    return z if total is None else total


def _cross_entropy(student: Distribution, index: Tensor) -> tuple[Tensor, Tensor]:
    gradient = student.p.clone()
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    return -student.log_p.gather(1, index).squeeze(1), gradient


def _metrics(
    z: Tensor,
    z_teacher: Tensor | None,
    index: Tensor,
    labelled: Tensor | None,
    student: Distribution | None,
    teacher: Distribution | None,
) -> Tensor:
    log_q = torch.log_softmax(z, dim=1) if student is None else student.log_p
    nothing = torch.zeros(z.shape[0], device=z.device)
    rows = [-log_q.gather(1, index).squeeze(1), nothing, nothing, nothing]
    if z_teacher is not None:
        p, log_p = softmax(z_teacher) if teacher is None else teacher
        rows[1] = -log_p.gather(1, index).squeeze(1)
        rows[2] = torch.linalg.vecdot(p, log_p - log_q)
        peaks = z.amax(dim=1) + z_teacher.amax(dim=1)  # on a CPU an argmax costs twelve times as much
        rows[3] = ((z + z_teacher).amax(dim=1) == peaks).float()
    table = torch.stack(rows)
    return (table if labelled is None else table * labelled).sum(dim=1)
