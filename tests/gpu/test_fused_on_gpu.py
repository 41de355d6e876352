"""The fused head on a GPU against float64 on the CPU: the same cases, terms and bounds as without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.losses import fused
from engine.losses.fused import fused_head_loss
from engine.schema import DenseTargets, Head
from tests import references
from tests.references import relative_error
from tests.unit.test_fused import LOSSES, SEVERAL, SIGN_BOUND, Case, make_case, reference

BOUND = 2e-6
"""Twice that of a CPU: a GPU's matrix product adds in another order, and the order changes with its size."""


def on_gpu(case: Case) -> Case:
    def move(tensor: Any) -> Any:
        return tensor.detach().cuda().requires_grad_(tensor.requires_grad) if isinstance(tensor, Tensor) else tensor

    def move_head(head: Head) -> Head:
        return Head(move(head.weight), move(head.bias), head.scale, head.softcap)

    targets = case.inputs.targets
    assert targets is not None
    targets = DenseTargets(move(targets.hidden), move_head(targets.head))
    inputs = replace(case.inputs, labels=case.inputs.labels.cuda(), targets=targets)
    return Case(move(case.hidden), move_head(case.head), inputs)


def gradients_on_gpu(case: Case, incoming: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    total, _, _ = fused_head_loss(case.hidden, case.head, case.inputs)
    found = torch.autograd.grad(total, case.leaves, torch.tensor(incoming, device="cuda"))
    return total.detach().cpu(), [gradient.cpu() for gradient in found]


@pytest.mark.parametrize("kind", LOSSES)
def test_every_term_in_fp32(kind: str) -> None:
    case = make_case([LOSSES[kind]], num_ids=5000, rows=70)
    total, gradients = gradients_on_gpu(on_gpu(case))
    expected_total, _, expected = reference(case)
    assert relative_error(total, expected_total) <= BOUND
    for gradient, wanted in zip(gradients, expected):
        assert relative_error(gradient, wanted) <= (SIGN_BOUND if kind == "total_variation" else BOUND)


@pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"scale": 0.25}, {"bias": False}, {"ignored": 13}])
def test_what_a_head_can_be(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused.CHUNK_BYTES, "cuda", 16 * 4 * 1000)  # several chunks
    case = make_case(SEVERAL, **settings)
    total, gradients = gradients_on_gpu(on_gpu(case), 65_536.0)
    expected_total, _, expected = reference(case, 65_536.0)
    assert relative_error(total, expected_total) <= BOUND
    for gradient, wanted in zip(gradients, expected):
        assert relative_error(gradient, wanted) <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_is_no_worse_than_torch(kind: str, dtype: torch.dtype) -> None:
    """Logits and their reductions stay fp32, where the plain way rounds whole logits to 16 bits."""
    case = make_case([LOSSES[kind]], dtype=dtype, num_ids=5000)
    expected_total, _, expected = reference(case)
    moved = on_gpu(case)
    total, gradients = gradients_on_gpu(moved)
    targets = moved.inputs.targets
    assert targets is not None
    z, z_teacher = (
        torch.nn.functional.linear(hidden, head.weight[:5000], head.bias[:5000])  # type: ignore[index]
        for hidden, head in ((moved.hidden, moved.head), (targets.hidden, targets.head))
    )
    plain_total, _ = references.objective(moved.inputs.losses, z.float(), z_teacher.float(), moved.inputs.labels)
    plain = torch.autograd.grad(plain_total, moved.leaves)
    assert relative_error(total, expected_total) <= relative_error(plain_total.cpu(), expected_total) + 1e-4
    for gradient, theirs, wanted in zip(gradients, plain, expected):
        assert relative_error(gradient, wanted) <= 1.05 * relative_error(theirs.cpu(), wanted) + 2e-3


def test_memory_is_that_of_a_chunk() -> None:
    """152,000 ids and 4,096 positions: whole logits and their gradient would be 2 x 2.5 GB for each model."""
    width, num_ids, rows = 256, 152_000, 4096
    weight = torch.randn(num_ids, width, device="cuda", dtype=torch.bfloat16).mul_(0.05).requires_grad_()
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = DenseTargets(torch.randn(rows, width, device="cuda", dtype=torch.bfloat16), Head(weight.detach(), None))
    inputs = fused.FusedInputs(
        labels=torch.randint(num_ids, (rows,), device="cuda"),
        all_labelled=True,
        targets=targets,
        losses=SEVERAL[:2],
        num_ids=num_ids,
        with_metrics=True,
        with_gradient=True,
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_head_loss(hidden, Head(weight, None), inputs)[0].backward()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    weight_gradient_bytes = num_ids * width * (4 + 2)  # fp32 sum and what leaves it
    assert peak_bytes <= weight_gradient_bytes + 12 * fused.CHUNK_BYTES["cuda"]
