"""Held-out text, scored by the same forward and the same fused head that training uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config.resolve import BatchPlan
from engine.data.loader import Loader, Shards
from engine.data.order import Location
from engine.dist import Control
from engine.errors import DataError, StillhouseError
from engine.losses.objective import Objective, StepContext
from engine.schema import Batch, StepBatches, Targets
from engine.sharing import raise_together
from engine.tasks.task import Task
from engine.teacher.source import TargetSource

Forward = Callable[[Batch, Targets | None, StepContext], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Means over the labelled positions of held-out text, in nats; None without a teacher."""

    num_labels: int
    student_loss: float
    teacher_loss: float | None
    kl: float | None
    """KL(teacher || student) at temperature 1"""
    agreement: float | None
    """share of positions where both have the same first choice"""

    @property
    def student_perplexity(self) -> float:
        return math.exp(self.student_loss)

    def to_record(self) -> dict[str, float]:
        record = {"eval/student_loss": self.student_loss, "eval/student_perplexity": self.student_perplexity}
        if self.teacher_loss is not None and self.kl is not None and self.agreement is not None:
            record |= {
                "eval/teacher_loss": self.teacher_loss,
                "eval/teacher_perplexity": math.exp(self.teacher_loss),
                "eval/kl": self.kl,
                "eval/agreement": self.agreement,
            }
        return record


class EvenlySpaced:
    """Takes the place of the data order: ``count`` samples spread evenly over the shards, the same every time."""

    def __init__(self, samples_per_shard: list[int], count: int) -> None:
        self.sequences_per_epoch = count
        self._ends = np.cumsum(samples_per_shard)
        self._num_samples = sum(samples_per_shard)

    def locate(self, sequence: int) -> Location:
        place = sequence * self._num_samples // self.sequences_per_epoch
        shard = int(np.searchsorted(self._ends, place, side="right"))
        assert shard < len(self._ends), "sequence is out of range"
        return Location(0, shard, place - (int(self._ends[shard - 1]) if shard else 0))


class Evaluator:
    """Scores a student on at most ``max_sequences`` held-out sequences. ``score`` is collective.

    Raises DataError when there are fewer sequences than ranks.
    """

    def __init__(
        self,
        shards: Shards,
        task: Task,
        objective: Objective,
        *,
        max_sequences: int,
        batch: BatchPlan,
        control: Control,
        device: torch.device,
    ) -> None:
        ranks = control.ranks
        counts = shards.manifest.samples_per_shard
        count = min(max_sequences, sum(counts))
        count -= count % ranks.world_size  # every rank makes the same number of forward passes
        if count == 0:
            raise DataError(f"the held-out shards hold {sum(counts)} sequences, too few for {ranks.world_size} ranks")
        local = count // ranks.world_size
        micro = max(size for size in range(1, min(batch.micro_sequences, local) + 1) if local % size == 0)
        self._num_passes = local // micro
        self._loader = Loader(
            shards,
            EvenlySpaced(counts, count),
            task.label,
            num_steps=self._num_passes,
            global_sequences=micro * ranks.world_size,
            micro_sequences=micro,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self._objective, self._device, self._control = objective, device, control

    @torch.no_grad()
    def score(self, forward: Forward, source: TargetSource) -> Evaluation:
        """``forward`` is the student with its objective, in evaluation mode.

        Raises on all ranks when one of them cannot read: its DataError there, TrainingError on the others.
        """
        names = self._objective.metric_names
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self._device)
        with_teacher = False
        with closing(self._loader.steps()) as steps:
            for _ in range(self._num_passes):
                batch = self._next(steps)
                targets = source.targets_for(batch, self._objective.rows(batch))
                with_teacher = targets is not None
                _, metrics = forward(batch, targets, StepContext(0, batch.num_labels, batch.num_tokens))
                sums[:-1] += metrics
                sums[-1] += batch.num_labels
        if self._control.ranks.world_size > 1:
            torch.distributed.all_reduce(sums)
        total = dict(zip([*names, "labels"], sums.tolist()))
        mean = {name: total[name] / max(1.0, total["labels"]) for name in names}
        return Evaluation(
            num_labels=int(total["labels"]),
            student_loss=mean["student_nll"],
            teacher_loss=mean["teacher_nll"] if with_teacher else None,
            kl=mean["kl_temperature_1"] if with_teacher else None,
            agreement=mean["agreement"] if with_teacher else None,
        )

    def _next(self, steps: Iterator[StepBatches]) -> Batch:
        """Whoever waits for a server is waited for here: what the forward pass exchanges has a limit of time."""
        problem: StillhouseError | None = None
        try:
            (batch,) = next(steps).micro_batches
        except StillhouseError as error:
            problem = error
        raise_together(self._control, problem)
        return batch.to(self._device)
