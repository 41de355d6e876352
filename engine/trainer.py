"""The training loop. It receives finished parts and owns nothing but their order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.callbacks import Callbacks
from engine.checkpoint import CheckpointStore
from engine.config.measures import MEASURES
from engine.config.resolve import ResolvedRun
from engine.data.client import CLIENT, Traffic
from engine.dist import Control, StopSignal
from engine.errors import DataError, StillhouseError, TrainingError
from engine.evaluation import Evaluator
from engine.losses.objective import Objective, StepContext
from engine.meter import Meter, PhaseTimer
from engine.metrics import RecordMaker
from engine.schedule import learning_rate_factor
from engine.schema import StepBatches
from engine.sharing import raise_together
from engine.state import TrainState, rng_state
from engine.teacher.ahead import InTurn, OneAhead
from engine.teacher.source import TargetSource
from engine.tracking import Tracker
from engine.watch import Watch
from engine.zero import StudentEngine

log = logging.getLogger("stillhouse")

SLOW_RECORDS, MAX_SLOW_NAMED = 3, 8
"""A rank is told of once it was slow in so many records running."""


class Steps(Protocol):
    def steps(self, start_step: int) -> Generator[StepBatches, None, None]: ...


@dataclass
class Trainer:
    """One run, from ``state.step`` to its end or to a request to stop."""

    # what to do
    run: ResolvedRun
    device: torch.device
    # parts
    engine: StudentEngine
    objective: Objective
    source: TargetSource
    turns: InTurn | OneAhead
    loader: Steps
    evaluator: Evaluator | None
    store: CheckpointStore
    tracker: Tracker
    control: Control
    stop: StopSignal
    watch: Watch
    records: RecordMaker
    show_progress: Callable[[int, dict[str, str]], None]
    callbacks: Callbacks
    checkpoint_meta: dict[str, Any]
    # what moves
    state: TrainState

    def __post_init__(self) -> None:
        self.meter = Meter(len(self.objective.metric_names), self.device)
        self.timer = PhaseTimer(self.device, self.watch.doing)
        self.local_bad = 0
        self.slow_for: dict[str, int] = {}
        self.skipped_before = self.engine.num_skipped_steps
        self.session_start = time.perf_counter() - self.state.elapsed_seconds

    def train(self) -> bool:
        """Train to the last step, or to an early stop. Returns False when a signal asked to stop before; a checkpoint
        is written either way.

        Raises TrainingError for a loss or gradient that is not finite, DataError for damaged data, CheckpointError
        for a failed save: on all ranks, with the same text.
        """
        config, last = self.run.config, self.run.num_steps
        self.records.begin(self.state)
        self.watch.now.step = self.state.step
        with closing(self.loader.steps(self.state.step)) as batches:
            while self.state.step < last and not self.state.stopped_early:
                fetched = self._fetch(batches)
                context, stop = self._agree(fetched)
                assert isinstance(fetched, StepBatches)
                self._step(fetched, context)
                self.state.step += 1
                step = self.watch.now.step = self.state.step
                if context.with_metrics:
                    self._record(fetched.epoch)
                is_best = False
                if self._evaluates(step):
                    is_best = self._evaluate()
                ends = step == last or self.state.stopped_early
                if stop or ends or is_best or step % config.checkpoint.every_steps == 0:
                    self._save()
                if stop:
                    log.info("stopping at step %d: %s was received; run the same command to resume", step, stop)
                    break
        self.store.finish_writing()
        if self.state.stopped_early:
            log.info("stopped early: held-out data were best after step %s", f"{self.state.best_step:,}")
        return self.state.step >= last or self.state.stopped_early

    def _evaluates(self, step: int) -> bool:
        """With early_stop after the last step too: it may have the best student."""
        section = self.run.config.evaluation
        if self.evaluator is None or section.every_steps is None:
            return False
        is_last = step == self.run.num_steps and self.run.config.early_stop is not None
        return is_last or step % section.every_steps == 0

    def _fetch(self, batches: Generator[StepBatches, None, None]) -> StepBatches | StillhouseError:
        """An error of this rank is carried to the agreement, where no rank is left waiting."""
        if self.callbacks.problem is not None:
            return self.callbacks.problem
        self.stop.received = self.stop.received or self.callbacks.asked_to_stop
        try:
            with self.timer.phase("data", on_device=False):
                step = next(batches)
            with self.timer.phase("teacher"):
                return self.source.complete(step)
        except StillhouseError as problem:
            return problem

    def _agree(self, fetched: StepBatches | StillhouseError) -> tuple[StepContext, str | None]:
        """One small all-reduce a step: the targets of the whole step, and whether any rank failed or wants to stop."""
        self.watch.doing("agreement")
        failed = isinstance(fetched, StillhouseError)
        batches = () if isinstance(fetched, StillhouseError) else fetched.micro_batches
        not_finite = self.meter.not_finite() if self._checks_now() else []
        labels, tokens, bad, num_failed, num_stop, num_not_finite, *traffic = self.control.sum(
            [
                sum(batch.num_labels for batch in batches),
                sum(batch.num_tokens for batch in batches),
                0 if isinstance(fetched, StillhouseError) else fetched.num_bad_samples,
                int(failed),
                int(self.stop.received is not None),
                len(not_finite),
                *CLIENT.take(),
            ]
        )
        self.records.add_traffic(Traffic(*traffic))
        if num_failed:
            raise_together(self.control, fetched if isinstance(fetched, StillhouseError) else None)
        if bad > self.run.config.data.max_bad_samples:
            raise DataError(
                f"{bad} damaged samples were met, more than data.max_bad_samples allows; the log names each"
            )
        if num_not_finite:
            self._not_finite("loss", not_finite)
        self.state.num_bad_samples = bad
        self.local_bad = 0 if isinstance(fetched, StillhouseError) else fetched.num_bad_samples
        self.state.num_tokens += tokens
        step, every = self.state.step + 1, self.run.config.tracking.every_steps
        context = StepContext(self.state.step, labels, tokens, step % every == 0 or step == self.run.num_steps)
        stop = next((name for name in self.control.gather(self.stop.received) if name), None) if num_stop else None
        return context, stop

    def _checks_now(self) -> bool:
        """On a CPU looking at a loss costs nothing; on a GPU it waits, so it is done with the records."""
        return self.device.type == "cpu" or self.state.step % self.run.config.tracking.every_steps == 0

    def _not_finite(self, what: str, names: list[str]) -> None:
        every = sorted({name for part in self.control.gather(names) for name in part})
        text = (
            f"the {what} was NaN or Inf in or before step {self.state.step} for a micro-batch of these sequences: "
            f"{', '.join(every[:16])}{' ...' if len(every) > 16 else ''}"
        )
        if self.run.precision == "fp16":
            log.warning("%s; the loss scaler skips such a step", text)
            return
        raise TrainingError(f"{text}; look at them, lower optimizer.learning_rate or optimizer.max_grad_norm")

    def _step(self, fetched: StepBatches, context: StepContext) -> None:
        learning_rate = self._learning_rate()
        asked = self.turns.over(fetched.micro_batches)
        for _ in fetched.micro_batches:
            with self.timer.phase("teacher"):
                batch, targets = next(asked)
            with self.timer.phase("student"):
                with self.timer.phase("forward"):
                    loss, metrics, _ = self.engine(batch, targets, context)
                del targets
                self.engine.backward(loss)
            self.meter.add(metrics, loss, batch.names)
            with self.timer.phase("optimizer"):
                self.engine.step(learning_rate)
        if self.run.precision != "fp16" and self.engine.num_skipped_steps > self.skipped_before:
            # DeepSpeed leaves such a step out on all ranks; only a loss scaler has a reason to go on
            self._not_finite("gradient", [name for batch in fetched.micro_batches for name in batch.names])
        self.records.add(context)

    def _learning_rate(self) -> float:
        section = self.run.config.schedule
        factor = learning_rate_factor(
            section.kind,
            self.state.step,
            self.run.num_steps,
            warmup_steps=section.warmup_steps,
            final_fraction=section.final_fraction,
            decay_steps=section.decay_steps,
            milestones=section.milestones,
            factor=section.factor,
        )
        return self.run.config.optimizer.learning_rate * factor * self.state.plateau_factor

    def _record(self, epoch: float) -> None:
        self.state.elapsed_seconds = time.perf_counter() - self.session_start
        record = self.records.make(self.state, self.meter.take(), self.timer.take(), self.engine, epoch)
        record["train/learning_rate"] = self._learning_rate()
        record |= self._compare_ranks(record)
        self.tracker.record(self.state.step, record)
        self.show_progress(self.state.step, self.records.headline(record))
        self.callbacks.record(self.state.step, record)

    def _compare_ranks(self, record: dict[str, float]) -> dict[str, float]:
        """A slow host shows in what its ranks do without waiting for others. They tell it with their signs of life,
        so comparing costs the training nothing."""
        phases = ("data", "teacher", "forward")
        self.watch.now.own_seconds = sum(record.get(f"seconds/{phase}", 0.0) for phase in phases)
        middle, slow = self.watch.slow_ranks()
        self.slow_for = {name: self.slow_for.get(name, 0) + 1 for name in slow}
        lasting = [name for name, num_records in self.slow_for.items() if num_records == SLOW_RECORDS]
        if lasting:
            told = ", ".join(f"{name} {slow[name]:.3f} s" for name in lasting[:MAX_SLOW_NAMED])
            log.warning("slow, in seconds of a step's own work: %s; the median of all ranks is %.3f s", told, middle)
        return {"ranks/median_own_seconds": middle, "ranks/num_slow": float(len(slow))} if middle else {}

    def _evaluate(self) -> bool:
        """Whether the student is the best so far, of a run that may stop early."""
        assert self.evaluator is not None
        self.watch.doing("evaluation")
        self.engine.train(False)
        result = self.evaluator.score(self.engine, self.source)
        self.engine.train(True)
        self.tracker.record(self.state.step, result.to_record())
        self.callbacks.evaluation(self.state.step, result.to_record())
        section = self.run.config.schedule
        if section.kind == "plateau":
            self.state.note_evaluation(
                result.student_loss, patience=section.patience, factor=section.factor, floor=section.final_fraction
            )
        early_stop = self.run.config.early_stop
        if early_stop is None:
            return False
        measure = early_stop.measure or MEASURES[self.run.config.task.kind][0]
        return self.state.note_measure(measure, result.measure(measure), early_stop.patience)

    def _save(self) -> None:
        self.watch.doing("checkpoint")
        bad = self.meter.not_finite()
        if sum(self.control.sum([len(bad)])):
            self._not_finite("loss", bad)
        begin = time.perf_counter()
        self.state.elapsed_seconds = begin - self.session_start
        meta = self.checkpoint_meta | {"state": self.state.to_dict()}
        self.store.best_step = self.state.best_step
        self.store.save(
            self.state.step, self.engine.save, {"rng": rng_state(), "num_bad_samples": self.local_bad}, meta
        )
        stall = time.perf_counter() - begin
        self.tracker.record(self.state.step, {"seconds/checkpoint_stall": stall})
        log.info("checkpoint at step %d: training waited %.2f s", self.state.step, stall)
        self.callbacks.checkpoint(self.state.step)
