"""What the report tells of a run in stages, from the folders that its stages left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.config.measures import measure_name
from engine.config.stages import FOLDER
from engine.report.quantities import MISSING, number, share
from engine.report.results import Results
from engine.tracking import EVENTS, METRICS, read_records
from engine.tracking.records import Record

EPOCH, SECONDS = "data/epoch", "time/elapsed_seconds"


@dataclass(frozen=True)
class StageRow:
    """A stage in a line."""

    name: str
    num_steps: int
    terms: str
    frozen: str
    quality: str
    state: str


def stage_folders(run_folder: Path) -> list[Path]:
    """In their order; none for a run in one piece."""
    return sorted(path for path in (run_folder / FOLDER).glob("*") if (path / "config.yaml").is_file())


def stage_rows(folders: list[Path]) -> tuple[list[StageRow], str]:
    """A row for each stage, and the name of what the held-out figures are."""
    rows, measure = [], ""
    for folder in folders:
        config = _config(folder)
        results = Results.load(folder)
        student = results.model("student") if results else None
        quality = MISSING
        if results is not None and student is not None:
            labelled = student.quality is not None
            measure = measure_name(results.measures[0]) if labelled else "perplexity"
            quality = share(student.quality) if labelled else number(student.perplexity)
        rows.append(
            StageRow(
                name=folder.name,
                num_steps=_last_step(read_records(folder / METRICS)),
                terms=", ".join(str(term.get("kind")) for term in config.get("losses", ())),
                frozen=", ".join(config.get("freeze") or ()) or "nothing",
                quality=quality,
                state=_state(folder),
            )
        )
    return rows, measure


def joined_records(folders: list[Path], file: str) -> list[Record]:
    """The records of all stages, with their steps and seconds counted on. Epochs are left out: each stage has its own
    data."""
    found: list[Record] = []
    steps, seconds = 0, 0.0
    for folder in folders:
        for record in read_records(folder / file):
            counted = {key: value for key, value in record.items() if key != EPOCH} | {"step": record["step"] + steps}
            if SECONDS in record:
                counted[SECONDS] = record[SECONDS] + seconds
            found.append(counted)
        metrics = read_records(folder / METRICS)
        steps += _last_step(metrics)
        seconds += max((record.get(SECONDS, 0.0) for record in metrics), default=0.0)
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _last_step(records: list[Record]) -> int:
    return max((record["step"] for record in records), default=0)


def _state(folder: Path) -> str:
    events = read_records(folder / EVENTS)
    last = events[-1] if events else {}
    return str(last.get("status", "unfinished")) if last.get("event") == "closed" else "unfinished"
