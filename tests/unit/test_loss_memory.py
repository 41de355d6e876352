"""What the planner says of the fused loss, against the arrays that are alive while it runs as on a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config.terms import AnyTerm, CrossEntropy, LogitTerm, Ramp
from engine.losses import fused
from engine.losses.block import LogitLoss
from engine.losses.fused import FusedInputs, fused_head_loss
from engine.losses.scratch import Scratch
from engine.memory import logit_arrays
from engine.schema import DenseTargets, Head, SparseTargets

IDS, ROWS, CHUNK_ROWS = 4000, 300, 100
CHUNK = 4 * IDS * CHUNK_ROWS


class ChunksAlive(TorchDispatchMode):
    """The most tensors of a chunk's size that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and CHUNK <= tensor.untyped_storage().nbytes() < 1.5 * CHUNK:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address not in self._alive:
            self._alive.add(address)
            self.peak = max(self.peak, len(self._alive))
            weakref.finalize(storage, self._alive.discard, address)


def from_a_cache() -> SparseTargets:
    """As top_k keeps them, which serves most terms."""
    weights = torch.full((ROWS, 5), 0.1)
    top = torch.randint(IDS, (ROWS,))
    ids = torch.stack([top + step for step in range(5)], dim=1) % IDS
    figures = torch.ones(ROWS)
    return SparseTargets(ids, weights, top, figures, figures, 1.0, torch.full((ROWS,), 0.5), "bucket", False)


def alive(losses: list[LogitLoss], monkeypatch: pytest.MonkeyPatch, *, sparse: bool = False) -> int:
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", CHUNK)
    monkeypatch.setitem(fused.BLOCK_BYTES, "cpu", 1 << 40)
    monkeypatch.setattr(Scratch, "new", lambda self: torch.empty(self._num_rows, IDS))  # the allocator's, as on a GPU
    weight, teacher = torch.randn(IDS, 8, requires_grad=True), Head(torch.randn(IDS, 8), None)
    compared = any(loss.kind != "cross_entropy" for loss in losses)
    inputs = FusedInputs(
        labels=torch.randint(IDS, (ROWS,)),
        all_labelled=True,
        targets=from_a_cache() if sparse else DenseTargets(torch.randn(ROWS, 8), teacher) if compared else None,
        losses=losses,
        num_ids=IDS,
        with_metrics=True,
        with_gradient=True,
    )
    with ChunksAlive() as seen:
        fused_head_loss(torch.randn(ROWS, 8, requires_grad=True), Head(weight, None), inputs)
    return seen.peak


@pytest.mark.parametrize(
    "terms",
    [
        [{"kind": "cross_entropy"}],
        [{"kind": "forward_kl"}],
        [{"kind": "forward_kl", "temperature": 2.0}, {"kind": "cross_entropy"}],
        [{"kind": "reverse_kl"}],
        [{"kind": "js", "beta": 0.5, "temperature": 2.0}, {"kind": "cross_entropy"}],
        [{"kind": "skew_kl", "alpha": 0.1}, {"kind": "total_variation", "temperature": 3.0}],
        [{"kind": "logits_mse"}],
    ],
    ids=lambda terms: "+".join(term["kind"] for term in terms),
)
def test_the_planner_counts_the_chunks_that_are_alive(
    terms: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(terms, monkeypatch, sparse=False)


@pytest.mark.parametrize(
    "terms",
    [
        [{"kind": "forward_kl"}, {"kind": "cross_entropy"}],
        [{"kind": "forward_kl", "temperature": 2.0}, {"kind": "cross_entropy"}],
        [{"kind": "js", "temperature": 2.0}, {"kind": "reverse_kl", "temperature": 3.0}],
    ],
    ids=lambda terms: "+".join(term["kind"] for term in terms),
)
def test_a_cache_of_few_ids_needs_no_chunk_of_the_teachers(
    terms: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(terms, monkeypatch, sparse=True)


def compare(terms: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, *, sparse: bool) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyTerm)
    parsed = [adapter.validate_python(term) for term in terms]
    said = logit_arrays(parsed, "cuda", sparse=sparse)
    real = alive([as_loss(term) for term in parsed], monkeypatch, sparse=sparse)
    assert real <= said <= real + 2


def as_loss(term: AnyTerm) -> LogitLoss:
    if isinstance(term, CrossEntropy):
        return LogitLoss("cross_entropy", 1.0)
    assert isinstance(term, LogitTerm)
    assert not isinstance(term.temperature, Ramp)
    parameter = getattr(term, "beta", getattr(term, "alpha", None))
    return LogitLoss(term.kind, 1.0, term.temperature, parameter)
