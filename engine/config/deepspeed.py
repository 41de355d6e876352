"""The DeepSpeed JSON: read, checked against the run that owns its numbers, and filled. Does not import DeepSpeed."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.deepspeed_keys import STAGE_3_OPTIONS, TOP_LEVEL, ZERO_OPTIONS
from engine.config.mistakes import nearest
from engine.errors import ConfigError

REFUSED = {
    "scheduler": "the run's schedule section owns the learning rate over the steps; remove it",
    "tensorboard": "set tracking.tensorboard in the run instead",
    "wandb": "set tracking.wandb in the run instead",
    "data_efficiency": "the order of the data is the run's data section; remove it",
}


class Owned(NamedTuple):
    """A number of the JSON that the run decides."""

    json_key: str
    run_key: str
    value: Any


def read_deepspeed_json(zero: str | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The run's DeepSpeed settings and the name to call them by in messages.

    Raises ConfigError when the file cannot be read, is not a JSON object, or holds a key twice.
    """
    if not isinstance(zero, str):
        return copy.deepcopy(dict(zero)), "zero"
    try:
        content = json.loads(Path(zero).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as problem:
        found = sorted(path.name for path in Path(zero).parent.glob("*.json"))
        near = nearest(Path(zero).name, found)
        raise ConfigError(f"zero: cannot read the DeepSpeed JSON {zero}: {problem.strerror}{near}") from problem
    except ValueError as problem:
        raise ConfigError(f"{zero}: not valid JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise ConfigError(f'{zero}: expected a JSON object such as {{"zero_optimization": {{"stage": 2}}}}')
    return content, zero


def check_names(content: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError for a key that DeepSpeed would ignore, and for a section that the run owns."""
    for key in content:
        if key in REFUSED:
            raise ConfigError(f"{name}: {key}: {REFUSED[key]}")
        if key not in TOP_LEVEL:
            raise ConfigError(f"{name}: {key}: unknown key, DeepSpeed would ignore it{nearest(key, TOP_LEVEL)}")
    for key, needed in (("gradient_allreduce_op", "mean"), ("managed_gradient_accumulation", True)):
        if content.get(key, needed) != needed:
            raise ConfigError(f"{name}: {key}: the engine's scaling of gradients counts on {needed!r}; remove it")
    for section in ("zero_optimization", "fp16", "bf16", "data_types", "optimizer"):
        if not isinstance(content.get(section, {}), dict):
            raise ConfigError(f"{name}: {section}: expected an object, found {content[section]!r}")
    for key in content.get("zero_optimization", {}):
        if key not in ZERO_OPTIONS:
            near = nearest(key, ZERO_OPTIONS)
            raise ConfigError(f"{name}: zero_optimization.{key}: unknown option, DeepSpeed would ignore it{near}")


def zero_stage(content: Mapping[str, Any], name: str) -> int:
    """The ZeRO stage. Raises ConfigError for a stage there is none of, or with an option only a later stage has."""
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{name}: zero_optimization.stage: expected 0, 1, 2 or 3, found {stage!r}")
    for key, value in zero.items():
        idle = value is False or (isinstance(value, dict) and value.get("device") == "none")
        if key in STAGE_3_OPTIONS and stage < 3 and not idle:
            raise ConfigError(f"{name}: zero_optimization.{key} works only at stage 3, and the stage is {stage}")
        if key == "offload_optimizer" and not idle:
            _check_offload(content, stage, name)
    return int(stage)


def _check_offload(content: Mapping[str, Any], stage: int, name: str) -> None:
    if stage == 0:
        raise ConfigError(f"{name}: zero_optimization.offload_optimizer needs stage 1, 2 or 3, and the stage is 0")
    if "optimizer" not in content and content.get("zero_force_ds_cpu_optimizer", True):
        raise ConfigError(
            f"{name}: zero_optimization.offload_optimizer needs DeepSpeed's own CPU optimizer; "
            'add "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}'
        )


def fill(content: Mapping[str, Any], name: str, owned: list[Owned], precision: str) -> dict[str, Any]:
    """The JSON with the run's numbers, the precision's section switched on and no "auto" left.

    "auto" in zero_optimization, fp16, bf16 and data_types means DeepSpeed's own default. Raises ConfigError for a
    number that the JSON gives with another value than the run, and for any other "auto".
    """
    _check_optimizer(content, name)
    filled = copy.deepcopy(dict(content))
    if "optimizer" in filled:
        filled["optimizer"].setdefault("type", "AdamW")
    for number in owned:
        section, key = _section_of(filled, number.json_key)
        if section is None:
            continue
        given = section.get(key, "auto")
        if given != "auto" and given != number.value:
            raise ConfigError(
                f"{name}: {number.json_key} is {given!r} but {number.run_key} gives {number.value!r}; "
                f'write "auto" in {name}, the run owns this number'
            )
        section[key] = number.value
    for half in ("fp16", "bf16"):
        if half == precision or half in filled:
            filled[half] = {**filled.get(half, {}), "enabled": half == precision}
    for section_name in ("zero_optimization", "fp16", "bf16", "data_types"):
        if section_name in filled:
            filled[section_name] = _without_autos(filled[section_name])
    if left := _autos(filled):
        raise ConfigError(f'{name}: {left[0]} is "auto", and the run has no value for it; give one or remove the key')
    filled["zero_allow_untested_optimizer"] = True
    filled.setdefault("wall_clock_breakdown", False)
    filled.setdefault("steps_per_print", 2**31)
    return filled


def _check_optimizer(content: Mapping[str, Any], name: str) -> None:
    if "optimizer" not in content:
        return
    optimizer = content["optimizer"]
    kind = optimizer.get("type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw") or optimizer.get("params", {}).get("adam_w_mode", True) is not True:
        raise ConfigError(
            f"{name}: optimizer is {json.dumps(optimizer)} but the run's optimizer is AdamW; "
            "give type AdamW, or remove the section and let the engine build it"
        )


def _section_of(content: dict[str, Any], json_key: str) -> tuple[dict[str, Any] | None, str]:
    """The object that holds ``json_key``. The JSON need not have an optimizer: then there is nothing to fill."""
    *sections, key = json_key.split(".")
    if "optimizer" in sections and "optimizer" not in content:
        return None, key
    for section in sections:
        content = content.setdefault(section, {})
    return content, key


def _without_autos(section: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in section.items() if value != "auto"}
    return {key: _without_autos(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _autos(content: Any, path: str = "") -> list[str]:
    if isinstance(content, dict):
        return [found for key, value in content.items() for found in _autos(value, f"{path}.{key}" if path else key)]
    return [path] if content == "auto" else []


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"the key {twice[0]!r} is given twice")
    return dict(pairs)
