"""Bytes a position of a teacher cache, and how far its gradient is from that of the whole distribution.

On the logits of a real teacher over real text. The gradient is that of forward KL at temperature 1 with respect to all
weights of a real student, over all samples at once; its angle and length are compared with full distillation's. Ways:
systematic draws (the ``sampled`` codec), independent draws written by the same code, and the k most likely ids
renormalised. Bytes hold the records and, for each sample, an index entry of 16 bytes and a hash of 8.

    python benchmarks/cache_size.py --teacher FOLDER --student FOLDER --manifest shards/manifest.json
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import leave_nothing_behind, print_table, write_json
from torch import Tensor

from engine.cache.sampled import Draws, SampledCodec, counted, draw_systematically
from engine.config.run import ModelSection, TaskSection
from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.data.shards import ShardSet
from engine.data.stateless import fold, random_bits
from engine.models import load_model
from engine.schema import Batch
from engine.tasks.task import Task, build_task
from engine.tasks.tokenizer import load_tokenizer

SAMPLE_BYTES = 16 + 8
Way = Callable[[Tensor, int], Draws]


def main() -> None:
    arguments = parse_arguments()
    leave_nothing_behind()
    shards = ShardSet.open(arguments.manifest)
    section = TaskSection(kind=shards.manifest.task, mask_fraction=arguments.mask_fraction)
    task = build_task(section, load_tokenizer(arguments.teacher), shards.manifest, shards.token_counts())
    batch = take_batch(shards, task, arguments.samples)
    p = torch.softmax(logits_of(arguments.teacher, task, batch).detach(), dim=1)
    student = logits_of(arguments.student, task, batch)
    exact = Gradient(student, p)
    samples = (batch.label_rows // batch.labels.shape[1]).numpy()
    ranks = ranking(shards.token_counts())
    rows = [
        measure(name, way, num_draws, p, exact, samples, ranks)
        for num_draws in arguments.draws
        for name, way in (("systematic", systematic), ("independent", independent))
    ]
    rows += [measure_top(k, p, exact) for k in arguments.top]
    facts = {
        "positions": len(p),
        "ids": p.shape[1],
        "entropy_nats": -torch.special.xlogy(p, p).sum(dim=1).mean().item(),
        "top_1": p.amax(dim=1).mean().item(),
    }
    print(", ".join(f"{name} {value:,.2f}" for name, value in facts.items()))
    header = ["way", "ids a position", "bytes a position", "bits an id", "target error", "angle, degrees", "norm ratio"]
    keys = ["way", "ids", "bytes", "bits_an_id", "target_error", "angle", "norm_ratio"]
    print_table(header, [[r[k] if isinstance(r[k], str) else f"{r[k]:.3f}" for k in keys] for r in rows])
    write_json(arguments.output, {"settings": vars(arguments) | {"output": None}, "facts": facts, "ways": rows})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="model folder")
    parser.add_argument("--student", required=True, help="model folder of the student whose gradient is compared")
    parser.add_argument("--manifest", required=True, help="shards to take the samples from")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--mask-fraction", type=float, default=0.3)
    parser.add_argument("--draws", type=int, nargs="+", default=[16, 32, 50, 64, 100])
    parser.add_argument("--top", type=int, nargs="+", default=[12, 50, 128])
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    return parser.parse_args()


def take_batch(shards: ShardSet, task: Task, samples: int) -> Batch:
    order = DataOrder(shards.manifest.samples_per_shard, seed=0, lanes=1, shuffle_samples=1024)
    loader = Loader(shards, order, task.label, num_steps=1, global_sequences=samples, micro_sequences=samples)
    return next(loader.steps()).micro_batches[0]


def logits_of(folder: str, task: Task, batch: Batch) -> Tensor:
    """[N, V] fp32 at the labelled positions, with their graph."""
    model = load_model(ModelSection(model=folder), task.model_class_name, torch.float32, "model").eval()
    return model(**task.model_inputs(batch, model)).logits.flatten(0, 1)[batch.label_rows].float()


class Gradient:
    """That of the student's weights under targets [N, V]."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self._logits, self._q = logits, torch.softmax(logits.detach(), dim=1)
        self._weights = list(_leaves(logits))
        self._exact = self._of(targets)

    def _of(self, targets: Tensor) -> Tensor:
        parts = torch.autograd.grad(self._logits, self._weights, self._q - targets, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def compare(self, targets: Tensor) -> tuple[float, float]:
        """Angle in degrees and ratio of lengths to the gradient under the exact targets."""
        got = self._of(targets)
        cosine = torch.dot(got, self._exact) / (got.norm() * self._exact.norm())
        return math.degrees(math.acos(min(1.0, cosine.item()))), (got.norm() / self._exact.norm()).item()


def _leaves(tensor: Tensor) -> set[Tensor]:
    """The weights that the graph of ``tensor`` begins with."""
    found, seen, open_nodes = set(), set(), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        open_nodes += [following for following, _ in node.next_functions]
    return found


def systematic(p: Tensor, num_draws: int) -> Draws:
    offsets = (random_bits(fold("offsets"), len(p)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return draw_systematically(p, torch.from_numpy(offsets), num_draws)


def independent(p: Tensor, num_draws: int) -> Draws:
    generator = torch.Generator().manual_seed(0)
    return counted(torch.multinomial(p, num_draws, replacement=True, generator=generator).sort(dim=1).values)


def ranking(token_counts: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(token_counts), np.int64)
    ranks[np.argsort(-token_counts, kind="stable")] = np.arange(len(token_counts))
    return ranks


def measure(
    name: str, way: Way, num_draws: int, p: Tensor, exact: Gradient, samples: np.ndarray, ranks: np.ndarray
) -> dict[str, Any]:
    codec = SampledCodec(ranks, num_draws)
    draws = way(p, num_draws)
    num_bytes, read = 0, []
    for sample in np.unique(samples):
        first, end = np.searchsorted(samples, [sample, sample + 1])
        mine = (draws.positions >= first) & (draws.positions < end)
        record = codec.encode(
            Draws(int(end - first), draws.positions[mine] - first, draws.ids[mine], draws.counts[mine])
        )
        num_bytes += len(record) + SAMPLE_BYTES
        read.append((first, codec.decode(record)))
    targets = torch.zeros_like(p)
    for first, part in read:
        targets[torch.from_numpy(part.positions + first), torch.from_numpy(part.ids)] = (
            torch.from_numpy(part.counts).float() / num_draws
        )
    row = compared(f"{name}, {num_draws} draws", p, targets, exact)
    return row | {
        "ids": len(draws.ids) / len(p),
        "bytes": num_bytes / len(p),
        "bits_an_id": 8 * num_bytes / len(draws.ids),
    }


def measure_top(k: int, p: Tensor, exact: Gradient) -> dict[str, Any]:
    """Its bytes are those of no codec yet."""
    values, ids = p.topk(k, dim=1)
    targets = torch.zeros_like(p).scatter_(1, ids, values / values.sum(dim=1, keepdim=True))
    return compared(f"top {k}", p, targets, exact) | {"ids": float(k), "bytes": math.nan, "bits_an_id": math.nan}


def compared(name: str, p: Tensor, targets: Tensor, exact: Gradient) -> dict[str, Any]:
    angle, ratio = exact.compare(targets)
    error = (targets - p).square().sum(dim=1).sqrt().mean().item()
    return {"way": name, "target_error": error, "angle": angle, "norm_ratio": ratio}


if __name__ == "__main__":
    main()
