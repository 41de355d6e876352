"""The teacher cache with a GPU: what is kept, and the loss on it, are those of a CPU; a run trains from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine import Distiller
from engine.cache.distribution import Exponentiator
from engine.cache.importance import ImportanceCodec
from engine.cache.sampled import SampledCodec
from engine.cache.top import TopCodec
from engine.capture import Capture
from engine.config.load import parse_config
from engine.dist import StopSignal
from engine.losses.block import LogitLoss
from engine.losses.fused import FusedInputs, fused_head_loss
from engine.schema import Head, SparseTargets, map_tensors
from tests.caching import CODECS, cached_run
from tests.references import relative_error

IDS, ROWS, WIDTH = 3000, 60, 32
CODECS_OF_DISTRIBUTIONS = {
    "sampled": SampledCodec(np.arange(IDS), 40),
    "proposal": ImportanceCodec(np.arange(IDS), 40, 1.25),
    "top_k": TopCodec(np.arange(IDS), max_k=30, min_k=30, p=1.0, max_error=0.05),
    "top_p": TopCodec(np.arange(IDS), max_k=50, min_k=2, p=0.8, max_error=0.05),
}


@pytest.mark.parametrize("name", CODECS_OF_DISTRIBUTIONS)
def test_what_is_kept_is_what_a_cpu_keeps(name: str) -> None:
    """But for draws and cuts that lie within rounding of a border."""
    chance = torch.Generator().manual_seed(1)
    z, offsets = torch.randn(ROWS, IDS, generator=chance) * 3, torch.rand(ROWS, generator=chance, dtype=torch.float64)
    tables = []
    for device in ("cpu", "cuda"):
        labels = torch.zeros(ROWS, dtype=torch.long, device=device)
        teacher = Exponentiator(ROWS, IDS, labels.device)(z.to(device), labels)
        kept = CODECS_OF_DISTRIBUTIONS[name].select(teacher, offsets.to(device))
        table = np.zeros((ROWS, IDS))
        table[kept.positions, kept.ids] = kept.values
        tables.append(table)
    assert (np.abs(tables[0] - tables[1]) > 1e-4).mean() < 1e-4


@pytest.mark.parametrize("handling", [None, "bucket", "renormalise", "residual_to_label"])
def test_the_loss_on_kept_ids(handling: str | None) -> None:
    chance = torch.Generator().manual_seed(2)
    weights, ids = torch.softmax(torch.randn(ROWS, IDS, generator=chance) * 2, dim=1).topk(12, dim=1)
    nothing = torch.zeros(ROWS)
    targets = SparseTargets(ids, weights, ids[:, 0], nothing, nothing, 1.0,
                            None if handling is None else 1.0 - weights.sum(dim=1), handling)  # fmt: skip
    hidden, weight = torch.randn(ROWS, WIDTH, generator=chance), torch.randn(IDS, WIDTH, generator=chance) * 0.3
    labels, found = torch.randint(IDS, (ROWS,), generator=chance), []
    for device in ("cpu", "cuda"):
        h, w = (tensor.to(device).requires_grad_() for tensor in (hidden, weight))
        moved = targets if device == "cpu" else map_tensors(targets, lambda tensor: tensor.cuda())
        inputs = FusedInputs(labels.to(device), True, moved, [LogitLoss("forward_kl", 0.7)], IDS, True, True)
        total, _, metrics = fused_head_loss(h, Head(w, None), inputs)
        found.append([total.detach(), metrics, *torch.autograd.grad(total, [h, w])])
    for on_cpu, on_gpu in zip(*found):
        assert relative_error(on_gpu.cpu(), on_cpu.double()) < 1e-5


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_run_trains_from_what_a_gpu_kept(tmp_path: Path, task: str, codec: str) -> None:
    config = cached_run(tmp_path, task, codec, run={"precision": "auto"}, teacher={"precision": "auto"})
    capture = Capture(parse_config(config), torch.device("cuda"))
    capture.run(range(3), StopSignal(), lambda standing: None)
    assert capture.folder.manifest() is not None
    assert Distiller(config).fit()
