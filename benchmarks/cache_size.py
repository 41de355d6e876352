"""Bytes a position of a teacher cache, and how far the gradient under its targets is from full distillation's.

On the answers of a real teacher over real text, through the codecs that write caches and the loss that reads them. The
gradient is that of forward KL at temperature 1 with respect to all weights of a real student. Its angle and length are
compared with those under the whole distribution, for each batch and for all batches added up. Ways:

- systematic draws (the ``sampled`` codec), and independent draws written by the same code
- ``top_k`` and ``top_p``, with each way to handle the tail
- DistillKit's scheme at its recommended and its budget setting, reconstructed as published, tail as a bucket

Bytes are those of the records and their index; what a sidecar has once (some 4 KB) is left out. The KL of a
reconstruction is over the kept ids and the rest as one outcome.

    python benchmarks/cache_size.py --teacher FOLDER --student FOLDER --manifest shards/manifest.json
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cache_ways import Way, ways
from measuring import leave_nothing_behind, print_table, write_json
from torch import Tensor

from engine.cache.distribution import Exponentiator
from engine.cache.folder import ranks_of
from engine.cache.kept import Kept, joined
from engine.cache.sidecar import INDEX_DTYPE
from engine.config.run import ModelSection, TaskSection
from engine.config.terms import ForwardKL
from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.data.shards import ShardSet
from engine.data.stateless import fold, random_bits
from engine.losses.head import head_logits
from engine.losses.layers import Shape
from engine.losses.objective import Objective, StepContext
from engine.models import MODEL_CLASSES, load_model
from engine.schema import Batch, DenseTargets, SparseTargets, Targets
from engine.student.module import StudentWithObjective
from engine.tasks.task import Task, build_task
from engine.tasks.tokenizer import load_tokenizer
from engine.teacher.online import OnlineTeacher

CHUNK_ROWS = 256


class Answered(NamedTuple):
    """A batch with the teacher's answer."""

    batch: Batch
    dense: DenseTargets
    lengths: list[int]
    """positions of each sample"""


def main() -> None:
    arguments = parse_arguments()
    leave_nothing_behind()
    shards = ShardSet.open(arguments.manifest)
    section = TaskSection(kind=shards.manifest.task, mask_fraction=arguments.mask_fraction)
    task = build_task(section, load_tokenizer(arguments.tokenizer or arguments.teacher), shards.manifest,
                      shards.token_counts())  # fmt: skip
    answered = ask(arguments, shards, task)
    gradients = Gradients(arguments.student, task, shards.manifest.vocab_size)
    exact = [gradients.of(each, each.dense) for each in answered]
    facts = facts_of(answered, shards.manifest.vocab_size)
    print(", ".join(f"{name} {value:,.2f}" for name, value in facts.items()), flush=True)
    header = ["way", "ids", "bytes", "bits an id", "KL", "angle, a batch", "angle, all", "norm ratio"]
    keys = ["way", "ids", "bytes", "bits_an_id", "kl", "angle_batch", "angle_all", "norm_ratio"]
    rows = [measure(way, answered, gradients, exact) for way in ways(arguments.draws, ranks_of(shards))]
    print_table(header, [[r[k] if isinstance(r[k], str) else f"{r[k]:.4g}" for k in keys] for r in rows])
    write_json(arguments.output, {"settings": vars(arguments) | {"output": None}, "facts": facts, "ways": rows})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="model folder")
    parser.add_argument("--student", required=True, help="model folder of the student whose gradient is compared")
    parser.add_argument("--manifest", required=True, help="shards to take the samples from")
    parser.add_argument("--tokenizer", help="folder (default: the teacher's)")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=8, help="of a batch")
    parser.add_argument("--mask-fraction", type=float, default=0.15)
    parser.add_argument("--draws", type=int, nargs="+", default=[16, 32, 50, 64])
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    return parser.parse_args()


def ask(arguments: argparse.Namespace, shards: ShardSet, task: Task) -> list[Answered]:
    order = DataOrder(shards.manifest.samples_per_shard, seed=0, lanes=1, shuffle_samples=1024)
    size = arguments.sequences
    loader = Loader(shards, order, task.label, num_steps=arguments.batches, global_sequences=size, micro_sequences=size)
    model = load_model(ModelSection(model=arguments.teacher), MODEL_CLASSES[task.kind], torch.float32, "teacher")
    teacher = OnlineTeacher(model, task, hidden_states=False)
    found = []
    for step in loader.steps():
        (batch,) = step.micro_batches
        lengths = torch.bincount(batch.label_rows // batch.labels.shape[1], minlength=size).tolist()
        found.append(Answered(batch, teacher.targets_for(batch, batch.label_rows), lengths))
    return found


class Gradients:
    """Of forward KL with respect to all weights of the student, through the fused loss."""

    def __init__(self, folder: str, task: Task, num_ids: int) -> None:
        model = load_model(ModelSection(model=folder), MODEL_CLASSES[task.kind], torch.float32, "student").eval()
        shape = Shape(model.config.hidden_size, model.config.num_hidden_layers)
        objective = Objective(
            (ForwardKL(kind="forward_kl"),), num_steps=1, num_ids=num_ids, student=shape, teacher=None
        )
        self._module = StudentWithObjective(model, objective, task)
        self._weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def of(self, answered: Answered, targets: Targets) -> Tensor:
        batch = answered.batch
        loss, _, _ = self._module(batch, targets, StepContext(0, batch.num_labels, batch.num_tokens, False))
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self._weights)])


def compare(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Angle in degrees, and the ratio of the lengths."""
    got, exact = got.double(), exact.double()
    cosine = torch.dot(got, exact) / (got.norm() * exact.norm())
    return math.degrees(math.acos(min(1.0, cosine.item()))), (got.norm() / exact.norm()).item()


def facts_of(answered: list[Answered], num_ids: int) -> dict[str, float]:
    sums, positions = torch.zeros(3, dtype=torch.float64), 0
    for each in answered:
        labels = each.batch.labels.flatten()[each.batch.label_rows]
        for rows, teacher in distributions(each.dense, labels, num_ids):
            sums += torch.stack(
                [teacher.entropy.sum(), teacher.nll.sum(), (teacher.mass.amax(dim=1) / teacher.total).sum()]
            )
            positions += len(labels[rows])
    entropy, nll, top = (sums / positions).tolist()
    facts = {"positions": positions, "ids": num_ids, "entropy_nats": entropy, "top_1": top}
    return facts | {"teacher_perplexity": math.exp(nll)}


def distributions(dense: DenseTargets, labels: Tensor, num_ids: int) -> Any:
    exponentiate = Exponentiator(CHUNK_ROWS, num_ids, labels.device)
    for start in range(0, len(labels), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        yield rows, exponentiate(head_logits(dense.hidden[rows], dense.head, num_ids), labels[rows])


def measure(way: Way, answered: list[Answered], gradients: Gradients, exact: list[Tensor]) -> dict[str, Any]:
    num_ids = gradients._module.objective.num_ids
    num_bytes, pairs, positions, kl, angles = 0, 0, 0, 0.0, []
    total = torch.zeros_like(exact[0])
    for number, each in enumerate(answered):
        labels = each.batch.labels.flatten()[each.batch.label_rows]
        bits = random_bits(fold("offsets", number), len(labels)) >> np.uint64(11)
        offsets = torch.from_numpy(bits.astype(np.float64) * 2.0**-53)
        parts = []
        for rows, teacher in distributions(each.dense, labels, num_ids):
            parts.append(way.select(teacher, offsets[rows]))
        kept = joined(parts)
        read, size = way.store(kept, each.lengths)
        num_bytes += size + len(each.lengths) * INDEX_DTYPE.itemsize
        pairs += len(read.ids)
        positions += len(labels)
        kl += reconstruction_kl(kept, read)
        gradient = gradients.of(each, targets_of(read, way.handling))
        angles.append(compare(gradient, exact[number])[0])
        total += gradient
    angle, ratio = compare(total, torch.stack(exact).sum(dim=0))
    return {
        "way": way.name,
        "ids": pairs / positions,
        "bytes": num_bytes / positions,
        "bits_an_id": 8 * num_bytes / pairs,
        "kl": kl / positions if way.handling else math.nan,
        "angle_batch": float(np.mean(angles)),
        "angle_all": angle,
        "norm_ratio": ratio,
    }


def targets_of(kept: Kept, handling: str | None) -> SparseTargets:
    ids, weights = kept.padded()
    nothing = torch.zeros(kept.num_positions)
    tail = None if kept.tail is None else torch.from_numpy(kept.tail)
    top_ids = torch.from_numpy(ids[:, 0])
    return SparseTargets(
        torch.from_numpy(ids), torch.from_numpy(weights), top_ids, nothing, nothing, 1.0, tail, handling
    )


def reconstruction_kl(kept: Kept, read: Kept) -> float:
    """Sum over positions, over the kept ids and the rest."""
    if kept.tail is None or read.tail is None:
        return math.nan
    by_place = [np.lexsort((each.ids, each.positions)) for each in (kept, read)]
    wanted = dict(zip(zip(kept.positions.tolist(), kept.ids.tolist()), kept.values.tolist()))
    p = np.array([wanted[pair] for pair in zip(read.positions[by_place[1]].tolist(), read.ids[by_place[1]].tolist())])
    got = read.values[by_place[1]].astype(np.float64)
    inside = np.bincount(read.positions[by_place[1]], p * np.log(p / got), read.num_positions)
    rest = np.maximum(1.0 - np.bincount(read.positions[by_place[1]], p, read.num_positions), 1e-12)
    return float((inside + rest * np.log(rest / np.maximum(read.tail, 1e-12))).sum())


if __name__ == "__main__":
    main()
