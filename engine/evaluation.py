"""Held-out text, scored by the same forward and the same fused head that training uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config.resolve import BatchPlan
from engine.config.run import RunConfig
from engine.data.loader import Loader, Shards
from engine.data.order import Location
from engine.dist import Control
from engine.errors import StillhouseError
from engine.losses.objective import Objective, StepContext
from engine.schema import Batch, LogitTargets, StepBatches, Targets
from engine.sharing import raise_together
from engine.tasks.scores import Scores
from engine.tasks.task import Task
from engine.teacher.source import TargetSource

TEXT_SEQUENCES = 1024
Forward = Callable[[Batch, Targets | None, StepContext], tuple[Tensor, Tensor, Tensor | None]]


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
    student: Scores | None = None
    """in the measures of a task with labels of its own"""
    teacher: Scores | None = None

    @property
    def student_perplexity(self) -> float:
        return math.exp(self.student_loss)

    def measure(self, name: str) -> float:
        """``loss``, or a measure of the task."""
        if name == "loss":
            return self.student_loss
        assert self.student is not None, "others are refused before the run begins"
        return self.student.measures[name]

    def to_record(self) -> dict[str, float]:
        record = {"eval/student_loss": self.student_loss}
        for role, scores in (("student", self.student), ("teacher", self.teacher)):
            if scores is not None:
                record |= {f"eval/{role}_{name}": value for name, value in scores.measures.items()}
        if self.student is None:
            record["eval/student_perplexity"] = self.student_perplexity
        if self.teacher_loss is not None and self.kl is not None and self.agreement is not None:
            record |= {"eval/teacher_loss": self.teacher_loss, "eval/kl": self.kl, "eval/agreement": self.agreement}
            if self.student is None:
                record["eval/teacher_perplexity"] = math.exp(self.teacher_loss)
        return record


def held_out_limit(config: RunConfig) -> int | None:
    """Sequences to score at most."""
    over_vocabulary = config.task.kind in ("masked_lm", "causal_lm")
    return config.evaluation.max_sequences or (TEXT_SEQUENCES if over_vocabulary else None)


class EvenlySpaced:
    """Takes the place of the data order: ``count`` samples spread evenly over the shards, the same every time."""

    def __init__(self, samples_per_shard: list[int], count: int) -> None:
        self.sequences_per_epoch = count
        self._ends = np.cumsum(samples_per_shard)
        self._num_samples = sum(samples_per_shard)

    def locate(self, sequence: int) -> Location | None:
        if sequence >= self.sequences_per_epoch:  # the last pass may have more rows than there are samples left
            return None
        place = sequence * self._num_samples // self.sequences_per_epoch
        shard = int(np.searchsorted(self._ends, place, side="right"))
        assert shard < len(self._ends), "sequence is out of range"
        return Location(0, shard, place - (int(self._ends[shard - 1]) if shard else 0))


class Evaluator:
    """Scores a student on at most ``max_sequences`` held-out sequences. ``score`` is collective."""

    def __init__(
        self,
        shards: Shards,
        task: Task,
        objective: Objective,
        *,
        max_sequences: int | None,
        batch: BatchPlan,
        control: Control,
        device: torch.device,
        one_width: bool = False,
    ) -> None:
        """``one_width`` as of a Loader."""
        ranks = control.ranks
        counts = shards.manifest.samples_per_shard
        count = min(max_sequences or sum(counts), sum(counts))
        local = -(-count // ranks.world_size)
        self._num_passes = -(-local // batch.micro_sequences)  # the same on every rank
        micro = -(-local // self._num_passes)
        self._loader = Loader(
            shards,
            EvenlySpaced(counts, count),
            task.label,
            num_steps=self._num_passes,
            global_sequences=micro * ranks.world_size,
            micro_sequences=micro,
            rank=ranks.rank,
            world_size=ranks.world_size,
            one_width=one_width,
        )
        self._task, self._objective, self._device, self._control = task, objective, device, control

    @torch.no_grad()
    def score(self, forward: Forward, source: TargetSource) -> Evaluation:
        """``forward`` is the student with its objective, in evaluation mode.

        Raises on all ranks when one of them cannot read: its DataError there, TrainingError on the others.
        """
        names = self._objective.metric_names
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self._device)
        observed: list[Any] = []
        taught: list[Any] = []
        with_teacher = False
        with closing(self._loader.steps()) as steps:
            for _ in range(self._num_passes):
                batch = self._next(steps)
                targets = source.targets_for(batch, self._objective.rows(batch))
                with_teacher = targets is not None
                _, metrics, logits = forward(batch, targets, StepContext(0, batch.num_labels, batch.num_tokens))
                if logits is not None:
                    observed += self._task.observe(logits, batch)
                if isinstance(targets, LogitTargets):
                    taught += self._task.observe(targets.logits, batch)
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
            student=self._scores(observed),
            teacher=self._scores(taught),
        )

    def _scores(self, observed: list[Any]) -> Scores | None:
        """Of what all ranks have observed; a task over the vocabulary observes nothing."""
        if self._task.over_vocabulary:
            return None
        everything = [each for part in self._control.gather(observed) for each in part]
        return self._task.score(everything) if everything else None

    def _next(self, steps: Iterator[StepBatches]) -> Batch:
        """Whoever waits for a server is waited for here: what the forward pass exchanges has a limit of time."""
        problem: StillhouseError | None = None
        try:
            (batch,) = next(steps).micro_batches
        except StillhouseError as error:
            problem = error
        raise_together(self._control, problem)
        return batch.to(self._device)
