"""A run in stages: each laid over the rest of the file becomes one whole run.

`stages` in the run YAML is a list; each item has a `name` and any keys of the file but `task`, `student` and `zero`:

    stages:
      - name: hidden
        losses: [{kind: hidden_mse, layers: spread}]
      - name: thaw
        unfreeze: [head, layers 3-5, layers 0-2, embeddings]      # four stages: each trains one part more
        run: {num_steps: 200}                                     # of each

A stage's sections are merged with those of the file, key by key; its lists and plain values take their place, and so
does a section of another `kind`. `unfreeze` stands for as many stages as it has parts: all parts that come later in the
list are frozen. The student of a later stage is what the one before it exported, with the best held-out data where
`early_stop` says so. Each stage is a run of its own in `runs/NAME/stages/`; the same command goes on in the stage that
was killed.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.source import KeyPath, Source
from engine.errors import ConfigError

STAGES, UNFREEZE = "stages", "unfreeze"
FOLDER = "stages"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LENGTHS = ("num_steps", "num_epochs")
_OF_THE_WHOLE = ("task", "student", "zero", "stages")
"""What every stage shares."""
_KEPT_OF_STUDENT = ("attention", "trust_remote_code")


@dataclass(frozen=True)
class StageSource:
    """One stage as plain data, with the places of its keys in the file."""

    name: str
    source: Source


def expand(source: Source) -> list[StageSource]:
    """The stages of a run; none for a run in one piece. Raises ConfigError, with lines, for what are no stages."""
    given = source.data.get(STAGES)
    if given is None:
        return []
    if not isinstance(given, list) or not given or not all(isinstance(stage, dict) for stage in given):
        raise ConfigError(f"{source.place((STAGES,))}{STAGES}: expected a list of sections, each with a name")
    expanded: list[StageSource] = []
    for index, stage in enumerate(given):
        at: KeyPath = (STAGES, index)
        name = _checked_name(stage, source, at)
        parts = _parts(stage.get(UNFREEZE), source, at)
        for number in range(max(1, len(parts))):
            own = {key: value for key, value in stage.items() if key not in ("name", UNFREEZE)}
            if parts:
                own["freeze"] = [*_listed(own.get("freeze")), *parts[number + 1 :]]
            stage_name = f"{len(expanded) + 1:02d}-{name}" + (f"-{number + 1}" if len(parts) > 1 else "")
            expanded.append(StageSource(stage_name, _laid_over(source, own, at, stage_name, expanded)))
    names = [stage["name"] for stage in given]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{source.place((STAGES,))}{STAGES}: the name {twice[0]!r} is given twice")
    return expanded


def _checked_name(stage: dict[str, Any], source: Source, at: KeyPath) -> str:
    name = stage.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{source.place(at)}{STAGES}.{at[1]}.name: expected a name of letters, digits, . _ and -")
    for key in _OF_THE_WHOLE:
        if key in stage:
            raise ConfigError(
                f"{source.place((*at, key))}{STAGES}.{at[1]}.{key}: belongs to the whole run, not a stage"
            )
    run = stage.get("run")
    if isinstance(run, dict) and (wrong := sorted(set(run) & {"name", "output", "stage_of"})):
        raise ConfigError(
            f"{source.place((*at, 'run', wrong[0]))}{STAGES}.{at[1]}.run.{wrong[0]}: give it once, for all"
        )
    return name


def _parts(unfreeze: Any, source: Source, at: KeyPath) -> list[str]:
    if unfreeze is None:
        return []
    if not isinstance(unfreeze, list) or not all(isinstance(part, str) for part in unfreeze):
        raise ConfigError(
            f"{source.place((*at, UNFREEZE))}{STAGES}.{at[1]}.{UNFREEZE}: expected a list of parts in the order in "
            "which they begin to train, such as [head, layers 3-5, layers 0-2, embeddings]"
        )
    return list(unfreeze)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _laid_over(source: Source, own: dict[str, Any], at: KeyPath, name: str, before: list[StageSource]) -> Source:
    """The whole run that the stage is; a key that the stage gives has its place there."""
    base = {key: value for key, value in source.data.items() if key != STAGES}
    data = _merged(base, own)
    run = data.get("run")
    whole = run.get("name") if isinstance(run, dict) else None
    if isinstance(run, dict) and isinstance(whole, str):
        folder = Path(str(run.get("output", "runs"))) / whole / FOLDER
        run |= {"name": name, "output": str(folder), "stage_of": whole}
        if isinstance(tracking := data.setdefault("tracking", {}), dict):
            tracking.setdefault("wandb_group", whole)
        _keep_teacher(data, base)
        if before and isinstance(data.get("student"), dict):
            kept = {key: data["student"][key] for key in _KEPT_OF_STUDENT if key in data["student"]}
            data["student"] = kept | {"model": str(folder / before[-1].name / "export")}
    places = {path: place for path, place in source.places.items() if path[:1] != (STAGES,)}
    places |= {path[2:]: place for path, place in source.places.items() if path[:2] == at and len(path) > 2}
    overrides = {path: text for path, text in source.overrides.items() if path[:1] != (STAGES,)}
    return Source(data, places, overrides)


def _keep_teacher(data: dict[str, Any], base: dict[str, Any]) -> None:
    """A stage without a teacher is still scored beside that of the run."""
    of_file, of_stage, evaluation = base.get("teacher"), data.get("teacher"), data.get("evaluation")
    if not isinstance(of_file, dict) or not isinstance(evaluation, dict) or not of_file.get("model"):
        return
    if isinstance(of_stage, dict) and not of_stage.get("model"):
        evaluation.setdefault("teacher", of_file["model"])


def _merged(base: Any, own: Any) -> Any:
    """``own`` laid over ``base``, neither of them changed."""
    if not isinstance(base, dict) or not isinstance(own, dict):
        return copy.deepcopy(own)
    if "kind" in own and own["kind"] != base.get("kind"):
        return copy.deepcopy(own)
    merged = copy.deepcopy(base)
    if any(key in own for key in _LENGTHS):  # one takes the other's place
        merged = {key: value for key, value in merged.items() if key not in _LENGTHS}
    for key, value in own.items():
        merged[key] = _merged(base[key], value) if key in base else copy.deepcopy(value)
    return merged
