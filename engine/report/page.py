"""Gather what lies in a run folder and fill the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.config.measures import measure_name
from engine.report import quantities
from engine.report.results import BATCH_SEQUENCES, Results, write_whole
from engine.report.stages import StageRow, joined_records, stage_folders, stage_rows
from engine.report.verdict import tiles, verdict
from engine.tracking import EVENTS, METRICS, read_records
from engine.tracking.records import Record

REPORT = "report.html"
TEMPLATE = "report.html.j2"
CONFIG_FILES = ("config.yaml", "ds_config.json")
ENVIRONMENT = "environment.json"
ORIGINS, CACHE = "origins", "cache"


def write_report(run_folder: Path, *, results: Results | None = None) -> Path:
    """Write report.html from the files of the run folder, and return its path. Close the tracker before.

    ``results`` are kept as results.json; without them those kept earlier are shown. A run that was stopped, or has
    written nothing, gives a page that says so. Raises CheckpointError when the folder cannot be read or written.
    """
    if results is None:
        results = Results.load(run_folder)
    else:
        results.save(run_folder)
    html = render(run_folder.resolve().name, _read_folder(run_folder), results)
    write_whole(run_folder / REPORT, html)
    return run_folder / REPORT


@dataclass(frozen=True)
class RunFiles:
    """What the run left behind. A file that is missing is empty here."""

    records: list[Record]
    events: list[Record]
    configs: list[tuple[str, str]]
    """name and text of each configuration file"""
    environment: list[tuple[str, str]]
    origins: list[tuple[str, str]]
    """each group of the student's weights, and where it came from"""
    cache: list[tuple[str, str]]
    """what the targets were read from; empty for a teacher that was asked online"""
    num_steps: int | None
    """steps that were planned"""
    stages: list[StageRow] = field(default_factory=list)
    stage_measure: str = ""
    """what the held-out figures of the stages are"""


def _read_folder(run_folder: Path) -> RunFiles:
    folders = stage_folders(run_folder)
    if folders and not (run_folder / CONFIG_FILES[0]).is_file():
        rows, measure = stage_rows(folders)
        return replace(
            _read_folder(folders[-1]),
            records=joined_records(folders, METRICS),
            events=joined_records(folders, EVENTS),
            configs=[(f"{folder.name}/{name}", _text(folder / name)) for folder in folders for name in CONFIG_FILES],
            num_steps=None,
            stages=rows,
            stage_measure=measure,
        )
    texts = {name: _text(run_folder / name) for name in CONFIG_FILES}
    environment, origins, cache = _environment(_text(run_folder / ENVIRONMENT))
    return RunFiles(
        records=read_records(run_folder / METRICS),
        events=read_records(run_folder / EVENTS),
        configs=[(name, texts[name]) for name in CONFIG_FILES if texts[name]],
        environment=environment,
        origins=origins,
        cache=cache,
        num_steps=_planned_steps(texts["config.yaml"]),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


Rows = list[tuple[str, str]]


def _environment(text: str) -> tuple[Rows, Rows, Rows]:
    """Rows with nested keys joined by dots, or the whole text where it does not parse; the origins and the cache that
    are kept in it."""
    try:
        stored = json.loads(text or "{}")
        origins = [(str(group), str(source)) for group, source in stored.pop(ORIGINS, [])]
        cache = [(str(name), str(value)) for name, value in stored.pop(CACHE, {}).items()]
    except (ValueError, TypeError, AttributeError):
        return [(ENVIRONMENT, text)], [], []
    return list(_flat(stored, "")), origins, cache


def _flat(value: Any, prefix: str) -> Sequence[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return [(prefix, shown)]


def _planned_steps(config_text: str) -> int | None:
    try:
        run = (yaml.safe_load(config_text) or {}).get("run") or {}
    except (yaml.YAMLError, AttributeError):
        return None
    steps = run.get("num_steps") if isinstance(run, dict) else None
    return steps if isinstance(steps, int) else None


def render(name: str, files: RunFiles, results: Results | None) -> str:
    """The whole page as text."""
    from engine.report import sections  # draws with matplotlib, which a run loads only at its end

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": quantities.number,
        "share": quantities.share,
        "count": quantities.count,
        "size": quantities.size,
        "duration": quantities.duration,
        "visible": visible,
        "measure": measure_name,
    }
    return environment.get_template(TEMPLATE).render(
        name=name,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        status=run_status(files),
        facts=_facts(files.records),
        verdict=verdict(results, files.records),
        tiles=tiles(results),
        results=results,
        learning=sections.learning_charts(files.records, results),
        machine=sections.machine_charts(files.records),
        phases=sections.phases(files.records),
        incidents=sections.incidents(files.records, files.events),
        origins=results.origins if results and results.origins else files.origins,
        cache=files.cache,
        stages=files.stages,
        stage_measure=files.stage_measure,
        batch_sequences=BATCH_SEQUENCES,
        configs=files.configs,
        environment=files.environment,
    )


def run_status(files: RunFiles) -> tuple[str, str]:
    """How the run ended: a kind (good, fair, bad) and the words for it."""
    steps = [item["step"] for item in (*files.records, *files.events)]
    if not steps:
        return "fair", "nothing recorded"
    reached = f"{max(steps):,}" + (f" of {files.num_steps:,}" if files.num_steps else "")
    last = files.events[-1] if files.events else {}
    if last.get("event") != "closed":
        return "fair", f"at step {reached}; still running, or killed"
    kind, words = {
        "completed": ("good", "completed"),
        "stopped": ("fair", "stopped on request"),
        "failed": ("bad", "failed"),
    }.get(str(last.get("status")), ("fair", "ended"))
    return kind, f"{words} at step {reached}"


def _facts(records: Sequence[Record]) -> list[str]:
    """A few words for the line below the title."""
    from engine.report.series import last_value

    facts = []
    if (elapsed_seconds := last_value(records, "time/elapsed_seconds")) is not None:
        facts.append(f"{quantities.duration(elapsed_seconds)} of training")
    if (epoch := last_value(records, "data/epoch")) is not None:
        facts.append(f"{quantities.number(epoch)} epochs of the data")
    return facts


def visible(word: str) -> str:
    """A word as it can be seen: blanks that would not show get a sign."""
    shown = word.strip(" ")
    return shown.replace("\n", "⏎").replace("\t", "⇥") if shown else "␣" * max(1, len(word))
