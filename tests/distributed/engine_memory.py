"""Started by test_engine_memory.py on each rank: bytes of all live tensors around a DeepSpeed engine, as JSON."""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import torch

from engine.config.run import OptimizerSection
from engine.meeting import meet
from engine.rendezvous import read_ranks
from engine.zero import build_ops, init_distributed
from tests import tiny

import deepspeed  # isort: skip  - after engine.zero has chosen the accelerator


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and not item.is_meta:
            storages[item.untyped_storage()._cdata] = item.untyped_storage().nbytes()
    return sum(storages.values())


def peak_bytes(config: dict[str, Any]) -> tuple[int, int]:
    """(parameters, bytes at most after a backward pass of the second step, which has two)"""
    before = live_bytes()
    model = tiny.model("causal_lm", hidden_size=128, intermediate_size=256, vocab_size=2048)
    num_parameters = sum(p.numel() for p in model.parameters())
    settings = OptimizerSection()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.zeros(1, 8, dtype=torch.long)
    after_backward = []
    for _ in range(4):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        after_backward.append(live_bytes() - before)
        engine.step()
    engine.destroy()
    return num_parameters, max(after_backward)


def main() -> None:
    init_distributed(meet(read_ranks()), 300.0)
    build_ops()
    measured = [peak_bytes(config) for config in json.loads(sys.argv[1])]
    if torch.distributed.get_rank() == 0:
        print("MEASURED", json.dumps(measured))


if __name__ == "__main__":
    main()
