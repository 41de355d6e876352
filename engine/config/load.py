"""The run YAML, with overrides, as a RunConfig. No torch, and no file is read but the YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from engine.config.mistakes import mistakes
from engine.config.run import RunConfig
from engine.config.source import Source, read_yaml
from engine.errors import ConfigError


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of the YAML at ``path``, with ``key.path=value`` overrides applied in order.

    Raises ConfigError: all mistakes at once, one a line, each with its line in the file or its override.
    """
    source = read_yaml(path)
    for override in overrides:
        source.override(override)
    return _validate(source)


def parse_config(mapping: Mapping[str, Any]) -> RunConfig:
    """The run that ``mapping`` describes, such as a saved ``RunConfig.model_dump(mode="json")``. Raises ConfigError."""
    return _validate(Source(dict(mapping)))


def _validate(source: Source) -> RunConfig:
    # Through JSON, because pydantic's strict mode takes a list for a tuple there, and yet no text for a number.
    content = json.dumps(source.data, default=str)
    try:
        return RunConfig.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(mistakes(error, source))) from None
