"""The run YAML, with overrides, as a RunConfig. No torch, and no file is read but the YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from engine.config.mistakes import mistakes
from engine.config.run import RunConfig
from engine.config.source import Source, read_yaml
from engine.config.stages import expand
from engine.errors import ConfigError


def load_stages(path: str, overrides: Sequence[str] = ()) -> list[RunConfig]:
    """The stages of the YAML at ``path``, each a run, with ``key.path=value`` overrides applied in order; a run without
    ``stages`` is one.

    Raises ConfigError: all mistakes at once, one a line, each with its line in the file or its override.
    """
    return _stages(_read(path, overrides))


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """As ``load_stages``, of a run in one piece. Raises ConfigError for one in stages."""
    return _one(_read(path, overrides))


def parse_stages(mapping: Mapping[str, Any]) -> list[RunConfig]:
    """The stages of the run that ``mapping`` describes. Raises ConfigError."""
    return _stages(Source(dict(mapping)))


def parse_config(mapping: Mapping[str, Any]) -> RunConfig:
    """The run that ``mapping`` describes, such as a saved ``RunConfig.model_dump(mode="json")``. Raises ConfigError."""
    return _one(Source(dict(mapping)))


def _read(path: str, overrides: Sequence[str]) -> Source:
    source = read_yaml(path)
    for override in overrides:
        source.override(override)
    return source


def _stages(source: Source) -> list[RunConfig]:
    if stages := expand(source):
        return [_validate(stage.source, stage.name) for stage in stages]
    config = _validate(source)
    refuse_stage(config)
    return [config]


def refuse_stage(config: RunConfig) -> None:
    """Raises ConfigError for the config that a stage's folder keeps: alone it would take the place of the whole run."""
    if (whole := config.run.stage_of) is not None:
        stage = config.run.name.partition("-")[2]
        raise ConfigError(
            f"this is the config of stage {config.run.name} of the run {whole}; run that one's YAML, with --from-stage "
            f"{stage} to do the stage again. To train from it alone, set run.name, run.output and run.stage_of=null"
        )


def _one(source: Source) -> RunConfig:
    if stages := expand(source):
        raise ConfigError(
            f"{source.place(('stages',))}this run has {len(stages)} stages, and one run is wanted here: each stage has "
            f"a config.yaml of its own, in the run's folder below stages/, such as stages/{stages[0].name}"
        )
    return _validate(source)


def _validate(source: Source, stage: str | None = None) -> RunConfig:
    # Through JSON, because pydantic's strict mode takes a list for a tuple there, and yet no text for a number.
    content = json.dumps(source.data, default=str)
    try:
        return RunConfig.model_validate_json(content, strict=True)
    except ValidationError as error:
        found = mistakes(error, source)
        raise ConfigError("\n".join(f"stage {stage}: {each}" if stage else each for each in found)) from None
