"""The head and every logit term in one pass over chunks of positions: logits of a whole batch never exist.

A chunk of student logits is formed, turned into its gradient in place, and multiplied back: dH = dZ W, dW += dZ^T H.
That is the arithmetic of the plain way, 6 N V H FLOPs (+ 2 N V G for the teacher), with memory for one chunk, dW and
dH. The gradient is formed unscaled, in units of one position, and **both** dH and dW are multiplied by the incoming
gradient in backward: the fp16 loss scale and the accumulation arrive there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engine.losses.divergence import DIVERGENCES, Distribution, New, forward_kl_value, logits_mse, softmax
from engine.losses.head import head_logits
from engine.losses.scratch import Scratch
from engine.schema import IGNORE, DenseTargets, Head

METRICS = ("student_nll", "teacher_nll", "kl_temperature_1", "agreement")
"""Sums over the labelled rows, formed only when asked for; teacher ones are 0 without targets."""
CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}
"""Size of one chunk of fp32 logits: large enough for a full-speed GEMM, small against dW."""
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 40}
"""Elementwise work goes in blocks of rows, so many a thread, that stay in the caches; a GPU takes the chunk whole."""


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
        num_rows = hidden.shape[0] if inputs.losses or inputs.with_metrics else 0
        chunk_rows = min(num_rows, max(16, CHUNK_BYTES[device.type] // row_bytes))
        # one buffer each for all chunks: on a CPU memory that is new costs a page fault for every 4 KiB
        shape = (chunk_rows, num_ids)
        student_buffer = torch.empty(shape, device=device)
        teacher_buffer = torch.empty(shape, device=device) if inputs.targets else None
        num_threads = torch.get_num_threads() if device.type == "cpu" else 1
        block_rows = num_threads * max(1, BLOCK_BYTES[device.type] // row_bytes)
        scratch = Scratch(min(chunk_rows, block_rows), num_ids, device)
        for start in range(0, num_rows, max(1, chunk_rows)):
            rows = slice(start, start + chunk_rows)
            h = hidden[rows]
            logits = head_logits(h, head, num_ids, out=student_buffer[: h.shape[0]])
            teacher = None
            if inputs.targets is not None and teacher_buffer is not None:
                states = inputs.targets.hidden[rows]
                teacher = head_logits(states, inputs.targets.head, num_ids, out=teacher_buffer[: h.shape[0]])
            _logits_to_gradient(logits, teacher, inputs.labels[rows], head, inputs, raw, metrics, scratch)
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


def _logits_to_gradient(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    head: Head,
    inputs: FusedInputs,
    raw: Tensor,
    metrics: Tensor,
    scratch: Scratch,
) -> None:
    """Replace ``logits`` by the gradient of the weighted sum, add to ``raw`` and ``metrics``. All are overwritten."""
    for start in range(0, logits.shape[0], scratch.max_rows):
        rows = slice(start, start + scratch.max_rows)
        z, z_teacher = logits[rows], None if teacher is None else teacher[rows]
        scratch.begin(z.shape[0])
        gradient = _block_gradient(z, z_teacher, labels[rows], inputs, raw, metrics, scratch.new)
        if not inputs.with_gradient:
            continue
        if head.softcap is not None:
            gradient.mul_(z.div(head.softcap).square_().neg_().add_(1.0))
        if head.scale != 1.0:
            gradient.mul_(head.scale)
        z.copy_(gradient)


class _Logits:
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


def _block_gradient(
    z: Tensor, z_teacher: Tensor | None, labels: Tensor, inputs: FusedInputs, raw: Tensor, metrics: Tensor, new: New
) -> Tensor:
    """Gradient of the weighted terms with respect to the student's final logits, [C, V]."""
    labelled = None if inputs.all_labelled else (labels != IGNORE)
    index = (labels if labelled is None else labels.clamp_min(0)).unsqueeze(1)
    student, teacher = _Logits(z, new), None if z_teacher is None else _Logits(z_teacher, new)
    total: Tensor | None = None
    for number, loss in enumerate(inputs.losses):
        t = loss.temperature
        value, gradient = _term(loss, student, teacher, index, new)
        mask = labelled if loss.labelled_only else None
        raw[number] += (value if mask is None else value * mask).sum() * (t * t)
        if not inputs.with_gradient:
            continue
        factor = loss.coefficient * t  # d(T^2 f(z/T))/dz = T f'(z/T)
        weight = factor if mask is None else mask.unsqueeze(1) * factor
        if total is None:
            total = torch.mul(gradient, weight, out=new())
        elif isinstance(weight, float):
            total.add_(gradient, alpha=weight)
        else:
            total.addcmul_(gradient, weight)
        if loss.kind == "cross_entropy":
            at_label = -weight if isinstance(weight, Tensor) else total.new_full(index.shape, -weight)
            total.scatter_add_(1, index, at_label)
    if inputs.with_metrics:
        metrics += _metrics(student, teacher, index, labelled, new)
    return z if total is None else total


def _term(loss: LogitLoss, student: _Logits, teacher: _Logits | None, index: Tensor, new: New) -> tuple[Tensor, Tensor]:
    """Value of each row, and the gradient, not to be written to; that of cross_entropy still lacks -1 at the label."""
    if loss.kind == "cross_entropy":
        q = student.at(loss.temperature)
        return -q.log_p_at(index), q.p
    assert teacher is not None
    if loss.kind == "logits_mse":
        return logits_mse(student.z, teacher.z, new)
    extra = () if loss.parameter is None else (loss.parameter,)
    return DIVERGENCES[loss.kind](student.at(loss.temperature), teacher.at(loss.temperature), *extra)


def _metrics(student: _Logits, teacher: _Logits | None, index: Tensor, labelled: Tensor | None, new: New) -> Tensor:
    nothing = torch.zeros(index.shape[0], device=index.device)
    rows = [-student.at(1.0).log_p_at(index), nothing, nothing, nothing]
    if teacher is not None:
        both = new()
        rows[1] = -teacher.at(1.0).log_p_at(index)
        rows[2] = forward_kl_value(student.at(1.0), teacher.at(1.0), both)
        peaks = student.peak + teacher.peak  # on a CPU an argmax costs twelve times as much
        torch.add(student.z, teacher.z, out=both)
        rows[3] = (both.amax(dim=1, keepdim=True) == peaks).squeeze(1).float()
    table = torch.stack(rows)
    return (table if labelled is None else table * labelled).sum(dim=1)
