"""The folder of a run in stages: which stages are done, what the next one begins with, what the whole run leaves.

runs/<name>/  stages/01-hidden/ (a run's folder, with FINISHED when it is done)  02-logits/ ...  export/  report.html
              set_aside/ (stages that were done again)
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from engine.config.run import RunConfig
from engine.config.stages import FOLDER
from engine.data.atomic import write_atomically
from engine.errors import CheckpointError, ConfigError
from engine.report import Results, write_report
from engine.runfolder import set_aside

log = logging.getLogger("stillhouse")

FINISHED = "FINISHED"
EXPORT = "export"
SET_ASIDE = "set_aside"


def folder_of(config: RunConfig) -> Path:
    """Of a run, or of a stage."""
    return Path(config.run.output) / config.run.name


def whole_folder(stages: Sequence[RunConfig]) -> Path:
    """Of the whole run: a run in one piece is its own."""
    folder = folder_of(stages[0])
    return folder.parent.parent if stages[0].run.stage_of is not None else folder


def newest_stage(folder: Path) -> Path:
    """``folder`` itself, or where it is that of a run in stages, its last stage with a checkpoint."""
    found = sorted((folder / FOLDER).glob("*/checkpoints"))
    return found[-1].parent if found else folder


def is_finished(config: RunConfig) -> bool:
    """Whether the stage is done, and what follows may begin with its export."""
    return (folder_of(config) / FINISHED).is_file()


def mark_finished(config: RunConfig) -> None:
    """The stage has exported. Raises CheckpointError where the folder cannot be written."""
    try:
        write_atomically(folder_of(config) / FINISHED, json.dumps({"export": EXPORT}).encode())
    except OSError as problem:
        raise CheckpointError(f"{folder_of(config)}: cannot be written ({problem})") from problem


def begin_at(stages: Sequence[RunConfig], name: str) -> None:
    """Set aside the stage ``name`` and those after it, so that they run again. Raises ConfigError for a name that is
    not there."""
    names = [stage.run.name for stage in stages]
    first = next((i for i, each in enumerate(names) if name in (each, each.partition("-")[2])), None)
    if first is None:
        raise ConfigError(f"--from-stage {name}: the stages are {', '.join(names)}")
    for stage in stages[first:]:
        if (old := set_aside(folder_of(stage), whole_folder(stages) / SET_ASIDE)) is not None:
            log.info("what was in %s is now in %s", folder_of(stage), old)


def finish_whole(stages: Sequence[RunConfig]) -> None:
    """Copy the last stage's export to the run's own folder, and write the report of all stages."""
    folder, last = whole_folder(stages), folder_of(stages[-1])
    temporary = folder / f".{EXPORT}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(last / EXPORT, temporary)
    shutil.rmtree(folder / EXPORT, ignore_errors=True)
    temporary.rename(folder / EXPORT)
    path = write_report(folder, results=Results.load(last))
    log.info("report of all stages: %s", path)
