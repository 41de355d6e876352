"""Terms against kept and sampled targets: value and gradient of the definitions, in float64 by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.losses import fused
from engine.losses.block import LogitLoss
from engine.losses.fused import FusedInputs, fused_head_loss
from engine.schema import DenseTargets, Head, SparseTargets, map_tensors
from tests import references
from tests.references import relative_error

ROWS, IDS, WIDTH, KEPT = 30, 700, 24, 12
BOUND = 5e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher_p(spread: float = 2.0) -> Tensor:
    return torch.softmax(random(ROWS, IDS, seed=4) * spread, dim=1)


def kept_targets(handling: str | None, temperature: float = 1.0, *, ragged: bool = False) -> SparseTargets:
    """The likeliest ids of ``teacher_p``; ``ragged`` cuts every other row to its first four."""
    p = teacher_p()
    weights, ids = p.topk(KEPT, dim=1)
    if ragged:
        weights[::2, 4:] = 0.0
        ids[::2, 4:] = ids[::2, :1]
    return SparseTargets(
        ids=ids,
        weights=weights,
        top_ids=ids[:, 0],
        nll=torch.full((ROWS,), 1.25),
        entropy=torch.full((ROWS,), 0.5),
        temperature=temperature,
        tail=None if handling is None else 1.0 - weights.double().sum(dim=1).float(),
        handling=handling,
    )


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(ROWS, IDS, dtype=torch.float64).scatter_add_(1, ids, weights.double())


class Run:
    """One call of the fused loss on a student of its own, and the logits it must have had, in float64."""

    def __init__(self, loss: LogitLoss, targets: SparseTargets | DenseTargets, softcap: float | None = None) -> None:
        self.hidden = random(ROWS, WIDTH, seed=1).requires_grad_()
        self.head = Head((random(IDS, WIDTH, seed=2) * 0.4).requires_grad_(), None, softcap=softcap)
        self.labels = torch.randint(IDS, (ROWS,), generator=torch.Generator().manual_seed(9))
        inputs = FusedInputs(self.labels, True, targets, [loss], IDS, with_metrics=True, with_gradient=True)
        total, self.raw, self.metrics = fused_head_loss(self.hidden, self.head, inputs)
        total.backward()
        self.leaves = [
            self.hidden.detach().double().requires_grad_(),
            self.head.weight.detach().double().requires_grad_(),
        ]
        self.z = references.logits(self.leaves[0], Head(self.leaves[1], None, softcap=softcap), IDS)

    def equals(self, value: Tensor, coefficient: float = 1.0) -> None:
        """The unweighted sum is ``value``; the gradient is that of ``coefficient * value``."""
        assert relative_error(self.raw[0], value.detach()) < BOUND
        (coefficient * value).backward()
        for got, leaf in zip((self.hidden.grad, self.head.weight.grad), self.leaves):
            assert leaf.grad is not None
            assert relative_error(got, leaf.grad) < BOUND


def bucketed(log_q: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """log q and log p over the kept ids and one more outcome; what is not kept in a row is far below."""
    kept = targets.weights > 0
    is_kept = dense(targets.ids, kept.double()) > 0
    tail = torch.where(is_kept, 0.0, log_q.exp()).sum(dim=1, keepdim=True)
    far = torch.full(kept.shape, -100.0, dtype=torch.float64)
    ours = torch.cat([torch.where(kept, log_q.gather(1, targets.ids), far), tail.log()], dim=1)
    assert targets.tail is not None
    theirs = torch.cat([targets.weights.double(), targets.tail.double().unsqueeze(1)], dim=1)
    return ours, theirs.log().clamp_min(-100.0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "skew_kl", "total_variation"])
def test_bucket_compares_the_kept_ids_and_the_rest_as_one(kind: str, ragged: bool, softcap: float | None) -> None:
    parameter = {"js": 0.3, "skew_kl": 0.1}.get(kind)
    targets = kept_targets("bucket", ragged=ragged)
    run = Run(LogitLoss(kind, 0.7, parameter=parameter), targets, softcap)
    log_q, log_p = bucketed(torch.log_softmax(run.z, dim=1), targets)
    run.equals(references.divergence(kind, log_q, log_p, parameter).sum(), 0.7)


@pytest.mark.parametrize("ragged", [False, True])
def test_renormalise_takes_the_kept_ids_for_the_whole(ragged: bool) -> None:
    targets = kept_targets("renormalise", ragged=ragged)
    run = Run(LogitLoss("forward_kl", 0.7), targets)
    p = dense(targets.ids, targets.weights / targets.weights.sum(dim=1, keepdim=True))
    run.equals((torch.special.xlogy(p, p) - p * torch.log_softmax(run.z, dim=1)).sum(), 0.7)


def test_residual_goes_to_the_label_whether_kept_or_not() -> None:
    targets = kept_targets("residual_to_label", ragged=True)
    labels = torch.randint(IDS, (ROWS,), generator=torch.Generator().manual_seed(9))
    targets.ids[1, 3] = labels[1]
    run = Run(LogitLoss("forward_kl", 0.7), targets)
    assert torch.equal(run.labels, labels)
    assert targets.tail is not None
    p = dense(targets.ids, targets.weights).scatter_add_(1, labels.unsqueeze(1), targets.tail.double().unsqueeze(1))
    run.equals((torch.special.xlogy(p, p) - p * torch.log_softmax(run.z, dim=1)).sum(), 0.7)


@pytest.mark.parametrize("importance", [False, True])
def test_sampled_weights_stand_for_all_ids(importance: bool) -> None:
    """With importance weights a row sums to 1 only in the mean: its gradient has its own sum times q."""
    targets = kept_targets(None)
    scale = torch.linspace(0.8, 1.2, ROWS).unsqueeze(1) if importance else 1.0
    weights = targets.weights / targets.weights.sum(dim=1, keepdim=True) * scale
    targets = SparseTargets(**{**vars(targets), "weights": weights, "importance": importance})
    run = Run(LogitLoss("forward_kl", 0.7), targets)
    p = dense(targets.ids, weights)
    run.equals(-(p * torch.log_softmax(run.z, dim=1)).sum() - 0.5 * ROWS, 0.7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_at_the_caches_temperature_both_are_softened_alike(temperature: float) -> None:
    """The cache's distribution is at its temperature already; the student's is brought there."""
    targets = kept_targets("bucket", temperature)
    run = Run(LogitLoss("forward_kl", 0.7, temperature), targets)
    log_q, log_p = bucketed(torch.log_softmax(run.z / temperature, dim=1), targets)
    run.equals(temperature**2 * references.divergence("forward_kl", log_q, log_p, None).sum(), 0.7)
    assert (run.metrics[2] != 0.0) == (temperature == 1.0), "there is no KL at 1 from another temperature"


@pytest.mark.parametrize("handling", ["bucket", "renormalise"])
def test_another_temperature_softens_the_kept_ids_and_an_even_tail(handling: str) -> None:
    """Exact for a teacher whose tail is even, which the test's is made to be."""
    p = dense(*reversed(teacher_p().topk(KEPT, dim=1)))
    p += torch.where(p > 0, 0.0, 0.3 * p.sum(dim=1, keepdim=True) / (IDS - KEPT))
    p /= p.sum(dim=1, keepdim=True)
    weights, ids = p.topk(KEPT, dim=1)

    def made(w: Tensor, tail: Tensor, at: float) -> SparseTargets:
        return SparseTargets(
            ids, w.float(), ids[:, 0], torch.zeros(ROWS), torch.zeros(ROWS), at, tail.float(), handling
        )

    softened = torch.softmax(p.log() / 2.0, dim=1)
    soft = softened.gather(1, ids)
    from_one = Run(LogitLoss("forward_kl", 1.0, 2.0), made(weights, 1.0 - weights.sum(dim=1), 1.0))
    from_two = Run(LogitLoss("forward_kl", 1.0, 2.0), made(soft, 1.0 - soft.sum(dim=1), 2.0))
    assert relative_error(from_one.raw[0], from_two.raw[0].double()) < 1e-5
    assert from_one.hidden.grad is not None
    assert from_two.hidden.grad is not None
    assert relative_error(from_one.hidden.grad, from_two.hidden.grad.double()) < 1e-5


def test_all_ids_kept_is_the_dense_loss() -> None:
    z = random(ROWS, WIDTH, seed=4)
    head = Head(random(IDS, WIDTH, seed=5) * 0.4, None)
    p = torch.softmax(references.logits(z, head, IDS), dim=1)
    ids = torch.arange(IDS).expand(ROWS, IDS)
    entropy = -torch.special.xlogy(p, p).sum(dim=1).float()
    sparse = SparseTargets(ids, p.float(), p.argmax(dim=1), torch.zeros(ROWS), entropy, 1.0)
    ours, theirs = (Run(LogitLoss("forward_kl", 0.7), targets) for targets in (sparse, DenseTargets(z, head)))
    assert relative_error(ours.raw[0], theirs.raw[0].double()) < 1e-5
    assert relative_error(ours.metrics[2:], theirs.metrics[2:].double()) < 1e-5
    assert ours.head.weight.grad is not None
    assert theirs.head.weight.grad is not None
    assert relative_error(ours.head.weight.grad, theirs.head.weight.grad.double()) < 1e-5


def test_a_tail_without_ids_or_mass_is_harmless() -> None:
    p = teacher_p()
    ids = torch.arange(IDS).expand(ROWS, IDS)
    nothing = torch.zeros(ROWS)
    sparse = SparseTargets(ids, p, p.argmax(dim=1), nothing, nothing, 1.0, torch.full((ROWS,), 1e-11), "bucket")
    run = Run(LogitLoss("forward_kl", 0.7), sparse)
    log_q = torch.log_softmax(run.z, dim=1)
    run.equals(references.divergence("forward_kl", log_q, p.double().log(), None).sum(), 0.7)


def test_metrics_tell_what_the_cache_knows() -> None:
    run = Run(LogitLoss("cross_entropy", 1.0), kept_targets("bucket"))
    assert run.metrics[1].item() == pytest.approx(1.25 * ROWS)
    agreed = (run.z.argmax(dim=1) == teacher_p().argmax(dim=1)).sum().item()
    assert run.metrics[3].item() == agreed


def test_chunks_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(LogitLoss("js", 0.7, parameter=0.3), kept_targets("bucket"))
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 16 * 4 * IDS)
    monkeypatch.setitem(fused.BLOCK_BYTES, "cpu", 3 * 4 * IDS)
    parts = Run(LogitLoss("js", 0.7, parameter=0.3), kept_targets("bucket"))
    assert relative_error(parts.raw, whole.raw.double()) < BOUND
    assert parts.hidden.grad is not None
    assert whole.hidden.grad is not None
    assert relative_error(parts.hidden.grad, whole.hidden.grad.double()) < BOUND


def test_moving_a_part_keeps_what_is_not_a_tensor() -> None:
    targets = kept_targets("bucket", 2.0)
    halves = map_tensors(targets, lambda tensor: tensor[:3])
    assert halves.ids.shape == (3, KEPT)
    assert (halves.handling, halves.temperature) == ("bucket", 2.0)
