"""The fused head against float64 autograd over whole logits: value and gradient, in every way a run can ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.losses import fused
from engine.losses.block import LogitLoss
from engine.losses.fused import FusedInputs, fused_head_loss
from engine.schema import IGNORE, DenseTargets, Head
from tests import references
from tests.references import relative_error

BOUND = 1e-6
SIGN_BOUND = 1e-3
"""Total variation's gradient jumps where q = p. Some of many logits lie within fp32's rounding of that, and each whose
sign turns moves the gradient by q: up to 2.3e-4 of its norm was met with 152,000 ids."""
LOSSES: dict[str, LogitLoss] = {
    "forward_kl": LogitLoss("forward_kl", 0.7, 2.0),
    "reverse_kl": LogitLoss("reverse_kl", 1.3, 1.5),
    "js": LogitLoss("js", 0.9, 2.0, 0.3),
    "skew_kl": LogitLoss("skew_kl", 1.1, 4.0, 0.1),
    "total_variation": LogitLoss("total_variation", 2.0, 1.0),
    "logits_mse": LogitLoss("logits_mse", 0.5),
    "cross_entropy": LogitLoss("cross_entropy", 0.4),
}
SEVERAL = [LOSSES["forward_kl"], LOSSES["cross_entropy"], LOSSES["logits_mse"], replace(LOSSES["js"], temperature=1.0)]


@dataclass
class Case:
    """The student's side in leaves that can be differentiated, the teacher's beside it."""

    hidden: Tensor
    head: Head
    inputs: FusedInputs

    @property
    def leaves(self) -> list[Tensor]:
        found = [self.hidden, self.head.weight] + ([] if self.head.bias is None else [self.head.bias])
        return [leaf for leaf in found if leaf.requires_grad]


def make_case(
    losses: Sequence[LogitLoss],
    *,
    rows: int = 40,
    num_ids: int = 1000,
    padding: int = 24,
    width: int = 64,
    seed: int = 0,
    bias: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
    ignored: int = 0,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
    metrics: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(dtype)

    head_rows, teacher_width = num_ids + padding, width + 16
    head = Head(
        draw(head_rows, width, size=spread / width**0.5).requires_grad_(),
        draw(head_rows, size=0.3).requires_grad_() if bias else None,
        scale,
        softcap,
    )
    teacher_head = Head(
        draw(head_rows + 8, teacher_width, size=spread / teacher_width**0.5), draw(head_rows + 8), scale, softcap
    )
    labels = torch.randint(num_ids, (rows,), generator=generator)
    labels[:ignored] = IGNORE
    inputs = FusedInputs(
        labels=labels,
        all_labelled=ignored == 0,
        targets=DenseTargets(draw(rows, teacher_width), teacher_head),
        losses=list(losses),
        num_ids=num_ids,
        with_metrics=metrics,
        with_gradient=True,
    )
    return Case(draw(rows, width).requires_grad_(), head, inputs)


def reference(case: Case, incoming: float = 1.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Total, each term's sum, and the gradients of the leaves, in float64."""
    inputs = case.inputs
    leaves = {id(leaf): leaf.detach().double().requires_grad_() for leaf in case.leaves}
    hidden = leaves.get(id(case.hidden), case.hidden)
    head = Head(*(leaves.get(id(t), t) for t in (case.head.weight, case.head.bias)), case.head.scale, case.head.softcap)
    z = references.logits(hidden, head, inputs.num_ids)
    assert inputs.targets is not None
    z_teacher = references.logits(inputs.targets.hidden, inputs.targets.head, inputs.num_ids)
    total, sums = references.objective(inputs.losses, z, z_teacher, inputs.labels)
    return total.detach(), sums.detach(), list(torch.autograd.grad(total * incoming, list(leaves.values())))


def ours(case: Case, incoming: float = 1.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    total, sums, _ = fused_head_loss(case.hidden, case.head, case.inputs)
    return total.detach(), sums, list(torch.autograd.grad(total, case.leaves, torch.tensor(incoming)))


def assert_same(case: Case, incoming: float = 1.0, bound: float = BOUND) -> None:
    total, sums, gradients = ours(case, incoming)
    expected_total, expected_sums, expected = reference(case, incoming)
    assert relative_error(total, expected_total) <= BOUND
    assert relative_error(sums, expected_sums) <= BOUND
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative_error(gradient, wanted) <= bound


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", LOSSES)
def test_every_term_is_within_a_millionth_of_float64(kind: str, seed: int) -> None:
    assert_same(make_case([LOSSES[kind]], seed=seed), bound=SIGN_BOUND if kind == "total_variation" else BOUND)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 24])
@pytest.mark.parametrize("ignored", [0, 13])
def test_every_combination(
    temperature: float, softcap: float | None, scale: float, bias: bool, padding: int, ignored: int
) -> None:
    """A KL over all rows at one temperature beside a cross entropy over the labelled ones at another."""
    losses = [
        replace(LOSSES["forward_kl"], temperature=temperature, labelled_only=False),
        replace(LOSSES["reverse_kl"], labelled_only=True),
        LOSSES["cross_entropy"],
    ]
    case = make_case(losses, softcap=softcap, scale=scale, bias=bias, padding=padding, ignored=ignored, num_ids=200)
    assert_same(case)


@pytest.mark.parametrize("chunk_rows", [16, 17, 40, 64])
@pytest.mark.parametrize("block_rows", [1, 7, 100])
def test_chunks_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk_rows: int, block_rows: int) -> None:
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", chunk_rows * 4 * 1000)
    monkeypatch.setitem(fused.BLOCK_BYTES, "cpu", block_rows * 4 * 1000)
    assert_same(make_case(SEVERAL, ignored=9))


def test_chunks_bound_the_logits_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest matrix of logits ever formed has a chunk's rows, however many rows there are."""
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 20 * 4 * 1000)
    seen: list[int] = []
    own = fused.head_logits

    def watched(hidden: Tensor, head: Head, num_ids: int, out: Tensor) -> Tensor:
        seen.append(hidden.shape[0])
        assert out.untyped_storage().nbytes() == 20 * 4 * 1000
        return own(hidden, head, num_ids, out)

    monkeypatch.setattr(fused, "head_logits", watched)
    ours(make_case(SEVERAL, rows=90))
    assert max(seen) == 20
    assert sum(seen) == 2 * 90  # the student's and the teacher's, each once


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows: int) -> None:
    case = make_case(SEVERAL, rows=rows)
    total, sums, gradients = ours(case)
    if rows:
        assert_same(case)
        return
    assert total == 0.0
    assert (sums == 0.0).all()
    assert all((gradient == 0.0).all() for gradient in gradients)


def test_padded_ids_take_no_part() -> None:
    """Whatever stands in the rows of the head past the tokenizer's ids: same loss, and no gradient there."""
    case = make_case(SEVERAL, padding=24)
    before = ours(case)
    assert case.inputs.targets is not None
    with torch.no_grad():
        for head in (case.head, case.inputs.targets.head):
            head.weight[1000:] = 1e6
            assert head.bias is not None
            head.bias[1000:] = 1e6
    after = ours(case)
    assert torch.equal(before[0], after[0])
    for gradient in after[2][1:]:
        assert (gradient[1000:] == 0.0).all()
        assert gradient[:1000].abs().sum() > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_scale_and_accumulation(dtype: torch.dtype) -> None:
    """Four micro-batches under a loss scale of 65,536: weight and hidden gradients both carry it, and add up."""
    scale, parts = 65_536.0, 4
    cases = [make_case(SEVERAL, seed=seed, dtype=dtype) for seed in range(parts)]
    weight, bias = cases[0].head.weight, cases[0].head.bias
    assert bias is not None
    expected = torch.zeros_like(weight, dtype=torch.float64)
    for number, case in enumerate(cases):
        cases[number] = case = Case(case.hidden, replace(case.head, weight=weight, bias=bias), case.inputs)
        total, _, _ = fused_head_loss(case.hidden, case.head, case.inputs)
        (total * (scale / parts)).backward()
        _, _, (d_hidden, d_weight, _) = reference(case, scale / parts)
        expected += d_weight
        assert case.hidden.grad is not None
        assert relative_error(case.hidden.grad, d_hidden) <= (BOUND if dtype == torch.float32 else 1e-2)
    assert weight.grad is not None
    assert relative_error(weight.grad, expected) <= (BOUND if dtype == torch.float32 else 1e-2)


def test_a_loss_scale_beyond_fp16_is_applied_before_rounding() -> None:
    """131,072 is infinite in fp16, its product with a small gradient is not."""
    case = make_case([replace(LOSSES["cross_entropy"], coefficient=1e-3)], dtype=torch.float16)
    _, _, gradients = ours(case, 131_072.0)
    _, _, expected = reference(case, 131_072.0)
    for gradient, wanted in zip(gradients, expected):
        assert relative_error(gradient, wanted) <= 2e-3


@pytest.mark.parametrize("kind", LOSSES)
def test_bf16_is_no_worse_than_torch(kind: str) -> None:
    """Against float64 on the same rounded numbers, the plain bf16 way loses more than ours, which reduces in fp32."""
    case = make_case([LOSSES[kind]], dtype=torch.bfloat16, spread=4.0)
    total, _, gradients = ours(case)
    expected_total, _, expected = reference(case)
    z = case.hidden @ case.head.weight[:1000].t() + case.head.bias[:1000]  # type: ignore[index]
    targets = case.inputs.targets
    assert targets is not None
    z_teacher = targets.hidden @ targets.head.weight[:1000].t() + targets.head.bias[:1000]  # type: ignore[index]
    plain_total, _ = references.objective(case.inputs.losses, z, z_teacher, case.inputs.labels)
    plain = torch.autograd.grad(plain_total, case.leaves)
    assert relative_error(total, expected_total) <= min(1e-2, max(relative_error(plain_total, expected_total), 2e-3))
    for gradient, theirs, wanted in zip(gradients, plain, expected):
        error = relative_error(gradient, wanted)
        assert error <= 1.05 * relative_error(theirs, wanted) + 2e-3
        assert error <= (0.2 if kind == "total_variation" else 0.02)


@pytest.mark.parametrize("kind", LOSSES)
def test_extreme_logits_stay_finite(kind: str) -> None:
    case = make_case([LOSSES[kind]], spread=1e4, metrics=True)
    total, sums, metrics = fused_head_loss(case.hidden, case.head, case.inputs)
    gradients = torch.autograd.grad(total, case.leaves)
    for tensor in (total, sums, metrics, *gradients):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ("hidden",)])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: tuple[str, ...]) -> None:
    whole = dict(zip(("hidden", "weight", "bias"), ours(make_case(SEVERAL))[2]))
    case = make_case(SEVERAL)
    leaves: dict[str, Any] = {"hidden": case.hidden, "weight": case.head.weight, "bias": case.head.bias}
    for name in frozen:
        leaves[name].requires_grad_(False)
    total, _, _ = fused_head_loss(case.hidden, case.head, case.inputs)
    total.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is None if name in frozen else torch.equal(leaf.grad, whole[name])


def test_without_gradient_the_values_are_the_same() -> None:
    case = make_case(SEVERAL, metrics=True, ignored=5)
    with_gradient = fused_head_loss(case.hidden, case.head, case.inputs)
    with torch.no_grad():
        without = fused_head_loss(case.hidden, case.head, replace(case.inputs, with_gradient=False))
    for one, other in zip(with_gradient, without):
        assert torch.equal(one, other)
    assert not without[0].requires_grad


def test_metrics_are_those_of_whole_logits() -> None:
    case = make_case([LOSSES["forward_kl"], LOSSES["cross_entropy"]], ignored=11, metrics=True, softcap=8.0)
    _, _, metrics = fused_head_loss(case.hidden, case.head, case.inputs)
    keep = case.inputs.labels != IGNORE
    labels = case.inputs.labels[keep]
    assert case.inputs.targets is not None
    z = references.logits(case.hidden.detach(), case.head, 1000)[keep]
    z_teacher = references.logits(case.inputs.targets.hidden, case.inputs.targets.head, 1000)[keep]
    log_q, log_p = torch.log_softmax(z, 1), torch.log_softmax(z_teacher, 1)
    expected = [
        torch.nn.functional.nll_loss(log_q, labels, reduction="sum"),
        torch.nn.functional.nll_loss(log_p, labels, reduction="sum"),
        (log_p.exp() * (log_p - log_q)).sum(),
        (z.argmax(1) == z_teacher.argmax(1)).sum(),
    ]
    torch.testing.assert_close(metrics.double(), torch.stack([e.double() for e in expected]), rtol=1e-6, atol=1e-6)


def test_without_targets_only_the_students_metric_is_formed() -> None:
    case = make_case([LOSSES["cross_entropy"]], metrics=True)
    inputs = replace(case.inputs, targets=None)
    total, _, metrics = fused_head_loss(case.hidden, case.head, inputs)
    expected, _, _ = fused_head_loss(case.hidden, case.head, case.inputs)
    assert torch.equal(total, expected)
    assert metrics[0] > 0.0
    assert (metrics[1:] == 0.0).all()
