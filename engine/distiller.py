"""The whole of a run as one object: what the launcher calls, and what a notebook imports."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.build import build_trainer
from engine.callbacks import Callback
from engine.config.load import load_stages, parse_stages, refuse_stage
from engine.config.run import RunConfig
from engine.dist import Control, StopSignal, leave_group, read_ranks
from engine.errors import ConfigError, DataError, StillhouseError
from engine.finish import finish_run
from engine.hosts.allocation import hosts_of_ranks
from engine.hosts.check import check_hosts
from engine.log import Progress, setup
from engine.meeting import meet
from engine.parts import Parts, Place, build_parts, check_run_against_data
from engine.rendezvous import is_restart
from engine.runfolder import set_aside
from engine.sharing import raise_together
from engine.staging import begin_at, finish_whole, folder_of, is_finished, mark_finished, whole_folder
from engine.tracking import Status
from engine.watch import Watch
from engine.zero import build_ops, init_distributed

log = logging.getLogger("stillhouse")


class Distiller:
    """``Distiller(config).fit()`` trains, exports and reports.

    ``config`` is a RunConfig, a mapping with its keys (and ``stages``), or the path of a run YAML. ``resume`` is
    ``auto`` (go on from the newest complete checkpoint of the run's folder), ``never``, or the folder of a checkpoint.
    ``from_stage`` runs a stage and those after it again. ``callbacks`` are told what goes on, on rank 0.
    Raises ConfigError, DataError, CheckpointError or TrainingError, each saying what to do.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | str | Path,
        overrides: Sequence[str] = (),
        resume: str = "auto",
        from_stage: str | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if isinstance(config, RunConfig):
            refuse_stage(config)
            self.stages = [config]
        elif isinstance(config, (str, Path)):
            self.stages = load_stages(str(config), overrides)
        else:
            self.stages = parse_stages(config)
        self.config = self.stages[-1]
        self.folder = whole_folder(self.stages)
        self.resume, self._from_stage, self._callbacks = resume, from_stage, tuple(callbacks)
        if self._in_stages and resume not in ("auto", "never"):
            raise ConfigError("a run in stages goes on by itself; to go back to the beginning of one give --from-stage")

    @property
    def _in_stages(self) -> bool:
        return self.folder != folder_of(self.config)

    def fit(self) -> bool:
        """Train to the end, or to a signal. Returns whether the end was reached; the report is written either way."""
        ranks = read_ranks()
        setup(ranks.rank)
        build_ops()  # here, where ranks wait long for each other: it takes a minute on a host's first start
        meeting = meet(ranks, expected=hosts_of_ranks(os.environ))
        timeout_seconds = self.config.cluster.timeout_seconds
        with StopSignal() as stop, Watch(meeting, timeout_seconds, self._alone_seconds()) as watch:
            device = init_distributed(meeting, timeout_seconds)
            place = Place(ranks, Control(ranks, watch.waiting), device)
            left = self._stages_left(place)
            for stage in left[:-1]:
                if not self._fit_stage(stage, place, stop, watch):
                    return False
            parts = self._prepared(left[-1], place)
            finished = self._train(parts, place, stop, watch)
            place.control.barrier()
            watch.close()
            leave_group(ranks)
            if ranks.rank == 0:  # nobody waits for what one rank can do alone
                assert watch.check is not None
                watch.check()
                finish_run(parts, folder_of(left[-1]), device, finished)
                if self._in_stages and finished:
                    mark_finished(left[-1])
                    finish_whole(self.stages)
        return finished

    def _alone_seconds(self) -> dict[str, float]:
        """How long a rank may be at what it does without the others."""
        return {"data": self.config.cluster.timeout_seconds + self.config.data.retry_seconds}

    def _stages_left(self, place: Place) -> list[RunConfig]:
        """What is still to do, the last stage at least; all of it is checked against the data before any of it begins.
        Collective."""
        if self._in_stages and place.control.is_main and not is_restart():
            if self.resume == "never":
                set_aside(self.folder)
            elif self._from_stage is not None:
                begin_at(self.stages, self._from_stage)
        done = place.control.from_main(sum(map(is_finished, self.stages[:-1])) if place.control.is_main else 0)
        left = self.stages[done:]
        for stage in left if len(left) > 1 else ():
            try:
                check_run_against_data(stage, place)
            except (ConfigError, DataError) as problem:
                raise type(problem)(f"stage {stage.run.name}: {problem}") from problem
        return left

    def _fit_stage(self, stage: RunConfig, place: Place, stop: StopSignal, watch: Watch) -> bool:
        """A stage that another follows. Collective."""
        parts = self._prepared(stage, place)
        finished = self._train(parts, place, stop, watch)
        problem: StillhouseError | None = None
        if place.control.is_main:
            try:
                finish_run(parts, folder_of(stage), place.device, finished, alone=True)
                if finished:
                    mark_finished(stage)
            except StillhouseError as error:
                problem = error
        raise_together(place.control, problem)
        gc.collect()
        return finished

    def _prepared(self, stage: RunConfig, place: Place) -> Parts:
        check_hosts(stage, place.control, place.device)
        return build_parts(stage, place)

    def _train(self, parts: Parts, place: Place, stop: StopSignal, watch: Watch) -> bool:
        is_main = place.ranks.rank == 0
        config = parts.run.config
        with Progress(parts.run.num_steps, config.run.name, enabled=is_main) as progress:
            # a restart, and a run in stages, finds by itself what it goes on from
            resume = "auto" if is_restart() or self._in_stages else self.resume
            trainer = build_trainer(parts, place, resume, stop, watch, progress.update, self._callbacks)
            setup(place.ranks.rank, folder_of(config) / "log.txt" if is_main else None)
            for part, origin in parts.student.origins:
                log.debug("student %s <- %s", part, origin)
            status: Status = "failed"
            try:
                finished = trainer.train()
                trainer.engine.close()
                status = "completed" if finished else "stopped"
            except StillhouseError:  # agreed by all ranks, which therefore are all there to finish a save
                watch.settle()
                trainer.store.settle()
                raise
            finally:
                trainer.tracker.close(status)
        return finished
