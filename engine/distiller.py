"""The whole of a run as one object: what the launcher calls, and what a notebook imports."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.build import build_trainer
from engine.config.load import load_config, parse_config
from engine.config.run import RunConfig
from engine.dist import Control, StopSignal, leave_group, read_ranks
from engine.errors import StillhouseError
from engine.finish import finish_run
from engine.hosts.allocation import hosts_of_ranks
from engine.hosts.check import check_hosts
from engine.log import Progress, setup
from engine.meeting import meet
from engine.parts import Parts, Place, build_parts
from engine.rendezvous import is_restart
from engine.tracking import Status
from engine.watch import Watch
from engine.zero import build_ops, init_distributed

log = logging.getLogger("stillhouse")


class Distiller:
    """``Distiller(config).fit()`` trains, exports and reports.

    ``config`` is a RunConfig, a mapping with its keys, or the path of a run YAML. ``resume`` is ``auto`` (go on from
    the newest complete checkpoint of the run's folder), ``never``, or the folder of a checkpoint.
    Raises ConfigError, DataError, CheckpointError or TrainingError, each saying what to do.
    """

    def __init__(
        self, config: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), resume: str = "auto"
    ) -> None:
        if isinstance(config, (str, Path)):
            config = load_config(str(config), overrides)
        self.config = config if isinstance(config, RunConfig) else parse_config(config)
        self.resume = resume
        self.folder = Path(self.config.run.output) / self.config.run.name

    def fit(self) -> bool:
        """Train to the end, or to a signal. Returns whether the end was reached; the report is written either way."""
        ranks = read_ranks()
        setup(ranks.rank)
        build_ops()  # here, where ranks wait long for each other: it takes a minute on a host's first start
        meeting = meet(ranks, expected=hosts_of_ranks(os.environ))
        timeout_seconds = self.config.cluster.timeout_seconds
        with StopSignal() as stop, Watch(meeting, timeout_seconds, self._alone_seconds()) as watch:
            device = init_distributed(meeting, timeout_seconds)
            place = Place(ranks, Control(ranks), device)
            check_hosts(self.config, place.control, device)
            parts = build_parts(self.config, place)
            finished = self._train(parts, place, stop, watch)
            place.control.barrier()
            watch.close()
            leave_group(ranks)
            if ranks.rank == 0:  # nobody waits for what one rank can do alone
                assert watch.check is not None
                watch.check()
                finish_run(parts, self.folder, device, finished)
        return finished

    def _alone_seconds(self) -> dict[str, float]:
        """How long a rank may be at what it does without the others."""
        return {"data": self.config.cluster.timeout_seconds + self.config.data.retry_seconds}

    def _train(self, parts: Parts, place: Place, stop: StopSignal, watch: Watch) -> bool:
        is_main = place.ranks.rank == 0
        with Progress(parts.run.num_steps, self.config.run.name, enabled=is_main) as progress:
            resume = "auto" if is_restart() else self.resume  # the folder to begin with was that of the first start
            trainer = build_trainer(parts, place, resume, stop, watch, progress.update)
            setup(place.ranks.rank, self.folder / "log.txt" if is_main else None)
            for part, origin in parts.student.origins:
                log.debug("student %s <- %s", part, origin)
            status: Status = "failed"
            try:
                finished = trainer.train()
                status = "completed" if finished else "stopped"
            except StillhouseError:  # agreed by all ranks, which therefore are all there to finish a save
                watch.settle()
                trainer.store.settle()
                raise
            finally:
                trainer.tracker.close(status)
        return finished
