"""The whole of a run as one object: what the launcher calls, and what a notebook imports."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.build import build_trainer
from engine.config.load import load_config, parse_config
from engine.config.run import RunConfig
from engine.dist import Control, StopSignal, leave_group, read_ranks
from engine.errors import StillhouseError
from engine.finish import finish_run
from engine.log import Progress, setup
from engine.parts import Parts, Place, build_parts
from engine.tracking import Status
from engine.zero import init_distributed

log = logging.getLogger("stillhouse")

COLLECTIVE_TIMEOUT_SECONDS = 1800.0


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
        device = init_distributed(COLLECTIVE_TIMEOUT_SECONDS)
        place = Place(ranks, Control(ranks), device)
        setup(ranks.rank)
        with StopSignal() as stop:
            parts = build_parts(self.config, place)
            finished = self._train(parts, place, stop)
            leave_group(ranks)
            if ranks.rank == 0:  # nobody waits for what one rank can do alone
                finish_run(parts, self.folder, device, finished)
        return finished

    def _train(self, parts: Parts, place: Place, stop: StopSignal) -> bool:
        is_main = place.ranks.rank == 0
        with Progress(parts.run.num_steps, self.config.run.name, enabled=is_main) as progress:
            trainer = build_trainer(parts, place, self.resume, stop, progress.update)
            setup(place.ranks.rank, self.folder / "log.txt" if is_main else None)
            for part, origin in parts.student.origins:
                log.debug("student %s <- %s", part, origin)
            status: Status = "failed"
            try:
                finished = trainer.train()
                status = "completed" if finished else "stopped"
            except StillhouseError:  # agreed by all ranks
                trainer.store.settle()
                raise
            finally:
                trainer.tracker.close(status)
        return finished
