"""One rank that reads held-out text late, or not at all: the others wait for it, or learn why."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from engine.data.collate import Labelled
from engine.data.manifest import Manifest, ShardEntry
from engine.dist import Control, Ranks
from engine.errors import StillhouseError, StoreError
from engine.evaluation import Evaluator
from engine.schema import Batch, Sample
from tests.launching import FORKS, start_server

LIMIT_SECONDS = 2.0
NAMES = ["student_nll", "teacher_nll", "kl_temperature_1", "agreement"]


class LateShards:
    """The last sample of rank 1 comes after what an exchange of tensors waits for, or never."""

    def __init__(self, never: bool) -> None:
        self.never = never
        self.manifest = Manifest("causal_lm", "", 9, 0, 4, 0, (ShardEntry("a.tar", 8, 0, 0, "", "", ""),), "", "")

    def read(self, shard: int, index: int) -> Sample:
        if index == 7 and self.never:
            raise StoreError("a.tar: cannot be read")
        if index == 7:
            time.sleep(2.0 * LIMIT_SECONDS)
        return Sample("a.tar", str(index), np.array([index, index], dtype=np.uint16), np.array([2], dtype=np.uint32))


def label(samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
    token_ids = np.concatenate([sample.token_ids for sample in samples])
    return token_ids, token_ids.astype(np.int64)


def forward(batch: Batch, *_: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
    total = torch.tensor([float(batch.input_ids.sum()), 0.0, 0.0, 0.0])
    dist.all_reduce(total.clone())  # as ZeRO-3 gathers weights
    return total[0], total, None


def evaluate(rank: int, port: int, never: bool, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    control = Control(Ranks(rank, 2, rank))
    control.barrier()
    dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))._set_default_timeout(
        timedelta(seconds=LIMIT_SECONDS)
    )
    objective: Any = SimpleNamespace(metric_names=NAMES, rows=lambda batch: None)
    task: Any = SimpleNamespace(label=label, over_vocabulary=True)
    source: Any = SimpleNamespace(targets_for=lambda batch, rows: None)
    plan: Any = SimpleNamespace(micro_sequences=2)
    evaluator = Evaluator(
        LateShards(never), task, objective, max_sequences=8, batch=plan, control=control, device=torch.device("cpu")
    )
    try:
        result = evaluator.score(forward, source)
        told = f"{result.num_labels} {result.student_loss}"
    except (StillhouseError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
    (folder / f"rank{rank}").write_text(told)


@pytest.mark.parametrize("never", [False, True])
def test_a_rank_that_reads_late_is_waited_for_and_one_that_cannot_is_named(tmp_path: Path, never: bool) -> None:
    start_server()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [FORKS.Process(target=evaluate, args=(rank, port, never, tmp_path)) for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
        each.kill()
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    if never:
        assert told[0] == "TrainingError: stopped with the others; rank 1: StoreError: a.tar: cannot be read"
        assert told[1] == "StoreError: a.tar: cannot be read"
    else:
        assert told == ["16 3.5", "16 3.5"], "of all sequences of both"
