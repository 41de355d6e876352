"""What a run comes to on so many ranks, with this accelerator and this data: pure arithmetic and cross-checks.

Every check raises ConfigError with the numbers that do not fit and the nearest that would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.checks import LABEL_TERMS, check_run
from engine.config.deepspeed import Owned, check_names, fill, read_deepspeed_json, zero_stage
from engine.config.run import BatchSection, RunConfig
from engine.errors import ConfigError
from engine.schedule import samples_of_epoch

__all__ = ["Accelerator", "BatchPlan", "DataFacts", "ResolvedRun", "read_deepspeed_json", "resolve"]


@dataclass(frozen=True)
class Accelerator:
    """What a rank computes on."""

    kind: str
    """cpu or cuda"""
    precisions: tuple[str, ...]
    """those it supports, best first"""


@dataclass(frozen=True)
class DataFacts:
    """What the manifest says of the data."""

    num_samples: int
    sequence_tokens: int
    vocab_size: int
    task: str
    has_labels: bool = True


@dataclass(frozen=True)
class BatchPlan:
    """global_sequences = world_size x accumulation x micro_sequences."""

    global_sequences: int
    micro_sequences: int
    world_size: int
    accumulation: int
    """micro-batches of a step on one rank"""
    local_sequences: int
    """sequences of a step on one rank"""


@dataclass(frozen=True)
class ResolvedRun:
    """A run that can start."""

    config: RunConfig
    batch: BatchPlan
    num_steps: int
    precision: str
    teacher_precision: str
    zero_stage: int
    deepspeed: dict[str, Any]
    """for ``deepspeed.initialize``; no "auto" is left"""


def resolve(
    config: RunConfig,
    *,
    world_size: int,
    accelerator: Accelerator,
    data: DataFacts,
    deepspeed_json: Mapping[str, Any],
    deepspeed_name: str,
) -> ResolvedRun:
    """The run on ``world_size`` ranks. Raises ConfigError when its parts do not fit together."""
    check_names(deepspeed_json, deepspeed_name)
    _check_data(config, world_size, data)
    _check_tensor_parallel(config.teacher.tp_size, world_size)
    batch = plan_batch(config.batch, world_size)
    num_steps = plan_steps(config, data.num_samples)
    check_run(config, num_steps)
    precision = _precision(config.run.precision, accelerator, deepspeed_json, deepspeed_name)
    return ResolvedRun(
        config=config,
        batch=batch,
        num_steps=num_steps,
        precision=precision,
        teacher_precision=_teacher_precision(config.teacher.precision, precision, accelerator),
        zero_stage=zero_stage(deepspeed_json, deepspeed_name),
        deepspeed=fill(deepspeed_json, deepspeed_name, _owned(config, batch), precision),
    )


def plan_batch(batch: BatchSection, world_size: int) -> BatchPlan:
    """Cut a step into ranks, then micro-batches. Raises ConfigError when it does not come out even."""
    whole, micro = batch.global_sequences, batch.micro_sequences
    if whole % world_size:
        raise ConfigError(
            f"batch.global_sequences = {whole} cannot be shared evenly by {world_size} ranks; "
            f"the nearest that can: {_nearest_multiples(whole, world_size)}"
        )
    local = whole // world_size
    if local % micro:
        divisors = [size for size in range(1, local + 1) if local % size == 0]
        near = sorted(sorted(divisors, key=lambda size: abs(size - micro))[:2])
        raise ConfigError(
            f"each rank has {whole} / {world_size} = {local} sequences a step, which batch.micro_sequences = {micro} "
            f"does not divide; use micro_sequences {_either(near)}, "
            f"or global_sequences {_nearest_multiples(whole, world_size * micro)}"
        )
    return BatchPlan(whole, micro, world_size, local // micro, local)


def plan_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps; ``num_epochs`` is rounded up to whole steps. An epoch leaves out what lanes do not share."""
    if config.run.num_steps is not None:
        return config.run.num_steps
    assert config.run.num_epochs is not None
    sequences = config.run.num_epochs * samples_of_epoch(num_samples, config.data.lanes, config.data.epoch_samples)
    return max(1, math.ceil(sequences / config.batch.global_sequences))


def _check_data(config: RunConfig, world_size: int, data: DataFacts) -> None:
    lanes = config.data.lanes
    if lanes % world_size:
        raise ConfigError(
            f"data.lanes = {lanes} cannot be shared evenly by {world_size} ranks; "
            f"the nearest that can: {_nearest_multiples(lanes, world_size)}"
        )
    if data.num_samples < lanes:
        raise ConfigError(
            f"{config.data.manifest} holds {data.num_samples:,} samples, fewer than data.lanes = {lanes}; "
            f"set data.lanes to at most {data.num_samples}"
        )
    if data.task != config.task.kind:
        raise ConfigError(f"{config.data.manifest} was built for {data.task}, but task.kind is {config.task.kind}")
    label_terms = [f"losses.{i}" for i, term in enumerate(config.losses) if term.kind in LABEL_TERMS]
    if label_terms and not data.has_labels:
        raise ConfigError(
            f"{config.data.manifest} has no labels, but {', '.join(label_terms)} (cross_entropy) learns from them; "
            "remove that term, or give data with labels"
        )


def _check_tensor_parallel(tp_size: int | None, world_size: int) -> None:
    if tp_size is not None and world_size % tp_size:
        divisors = [size for size in range(2, world_size + 1) if world_size % size == 0]
        near = sorted(sorted(divisors, key=lambda size: abs(size - tp_size))[:2])
        advice = f"use tp_size {_either(near)}, or " if near else ""
        raise ConfigError(
            f"teacher.tp_size = {tp_size} does not divide {world_size} {'rank' if world_size == 1 else 'ranks'}; "
            f"{advice}{_nearest_multiples(world_size, tp_size)} ranks"
        )


def _precision(wanted: str, accelerator: Accelerator, content: Mapping[str, Any], name: str) -> str:
    enabled = {half: content.get(half, {}).get("enabled", "auto") for half in ("fp16", "bf16")}
    named = [half for half, value in enabled.items() if value is True]
    if len(named) == 2:
        raise ConfigError(f"{name}: fp16.enabled and bf16.enabled are both true; DeepSpeed can train in one of them")
    for half, value in enabled.items():
        if wanted != "auto" and value != "auto" and value is not (half == wanted):
            raise ConfigError(
                f"run.precision is {wanted} but {half}.enabled is {str(value).lower()} in {name}; "
                f'write "auto" there, or make the two agree'
            )
    if wanted != "auto":
        return _supported(wanted, accelerator, "run.precision")
    if named:
        return _supported(named[0], accelerator, f"{named[0]}.enabled in {name}")
    return next(precision for precision in accelerator.precisions if enabled.get(precision, "auto") is not False)


def _teacher_precision(wanted: str, student: str, accelerator: Accelerator) -> str:
    return student if wanted == "auto" else _supported(wanted, accelerator, "teacher.precision")


def _supported(precision: str, accelerator: Accelerator, where: str) -> str:
    if precision not in accelerator.precisions:
        raise ConfigError(
            f"{where}: precision {precision} is not supported on {accelerator.kind}; "
            f"use {', '.join(sorted(accelerator.precisions))} or auto"
        )
    return precision


def _owned(config: RunConfig, batch: BatchPlan) -> list[Owned]:
    optimizer = config.optimizer
    return [
        Owned("train_batch_size", "batch.global_sequences", batch.global_sequences),
        Owned("train_micro_batch_size_per_gpu", "batch.micro_sequences", batch.micro_sequences),
        Owned("gradient_accumulation_steps", "the batch section", batch.accumulation),
        Owned("gradient_clipping", "optimizer.max_grad_norm", optimizer.max_grad_norm),
        Owned("optimizer.params.lr", "optimizer.learning_rate", optimizer.learning_rate),
        Owned("optimizer.params.betas", "optimizer.betas", list(optimizer.betas)),
        Owned("optimizer.params.eps", "optimizer.eps", optimizer.eps),
        Owned("optimizer.params.weight_decay", "optimizer.weight_decay", optimizer.weight_decay),
    ]


def _nearest_multiples(number: int, of: int) -> str:
    below = number // of * of
    return _either([value for value in (below, below + of) if value > 0])


def _either(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
