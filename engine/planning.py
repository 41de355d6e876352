"""A run worked out on paper: batch, steps, memory by part, FLOPs and hours, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from engine.config.cache import HiddenSection
from engine.config.load import load_stages
from engine.config.resolve import Accelerator, DataFacts, ResolvedRun, read_deepspeed_json, resolve
from engine.config.run import RunConfig
from engine.config.terms import HiddenTerm, LogitTerm
from engine.cost import ParameterCount, count_parameters, peak_flops, training_flops_per_token
from engine.data.shards import ShardSet
from engine.errors import ConfigError, DataError
from engine.losses.hidden import layer_pairs
from engine.memory import VALUE_BYTES, StateBytes, activation_bytes, head_loss_bytes, student_state_bytes
from engine.models import MODEL_CLASSES, load_hf_config, shell
from engine.remedies import teacher_changes, zero_changes
from engine.student.build import student_config
from engine.teacher.footprint import teacher_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RESERVE_BYTES = {"cuda": 2 * 10**9, "cpu": 10**9}
"""CUDA's context, NCCL, cuBLAS workspaces and what the allocator cannot reuse; the process itself on a CPU."""
FEW_CLASSES_ARRAYS = 8
BATCH_BYTES_PER_TOKEN = 3 * 8 + 4 + 2 * 8
"""Tensors of a Batch: three int64 and one int32 a position, and two lists of rows."""


@dataclass(frozen=True)
class Machine:
    """What the run shall be planned for."""

    kind: str
    """cuda or cpu"""
    world_size: int
    memory_bytes: int | None
    device: str | None
    """name of the device, for its peak FLOPs"""
    mfu: float

    def accelerator(self) -> Accelerator:
        if self.kind == "cpu":
            return Accelerator("cpu", ("fp32", "bf16"))
        has_bf16 = self.device is None or peak_flops(self.device, "bf16") or not peak_flops(self.device, "fp16")
        return Accelerator("cuda", ("bf16", "fp16", "fp32") if has_bf16 else ("fp16", "fp32"))


class Part(NamedTuple):
    """One line of the memory table."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """All that preflight shows."""

    run: ResolvedRun
    data: DataFacts
    deepspeed_name: str
    student: ParameterCount
    teacher: ParameterCount | None
    parts: tuple[Part, ...]
    host_bytes: int
    """offloaded to host memory by one rank"""
    checkpoint_bytes: int
    flops_per_token: float

    @property
    def device_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return self.run.num_steps * self.run.batch.global_sequences * self.data.sequence_tokens

    @property
    def num_epochs(self) -> float:
        lanes = self.run.config.data.lanes
        return self.run.num_steps * self.run.batch.global_sequences / (self.data.num_samples // lanes * lanes)

    def fits(self, machine: Machine) -> bool:
        assert machine.memory_bytes is not None
        return self.device_bytes <= machine.memory_bytes

    def hours(self, machine: Machine) -> float | None:
        """At the machine's MFU, or None for a device of unknown peak."""
        peak = peak_flops(machine.device, self.run.precision) if machine.device else None
        if peak is None:
            return None
        return self.num_tokens * self.flops_per_token / (machine.world_size * peak * machine.mfu) / 3600.0


class Planner:
    """Plans the run of a YAML, and the same run with other settings."""

    def __init__(
        self,
        path: str,
        overrides: Sequence[str],
        machine: Machine,
        num_samples: int | None,
        sequence_tokens: int | None,
        stage: int = 0,
    ) -> None:
        """``stage`` of a run in stages counts from 0; its student is that of the first, which is not trained yet."""
        self._path, self._overrides, self._machine, self._stage = path, list(overrides), machine, stage
        stages = load_stages(path, overrides)
        self._config = stages[stage]
        self._teacher = _teacher_config(self._config)
        first = self._teacher if stage == 0 else _teacher_config(stages[0])
        self._student = student_config(stages[0].student, first)
        vocab_size = self._student.get_text_config().vocab_size
        self._data = _data_facts(self._config, vocab_size, num_samples, sequence_tokens)

    def plan(self, *overrides: str) -> Plan:
        """The run with ``overrides`` on top. Raises ConfigError when its parts do not fit together."""
        config = self._config
        if overrides:
            config = load_stages(self._path, [*self._overrides, *overrides])[self._stage]
        content, name = read_deepspeed_json(config.zero)
        run = resolve(
            config,
            world_size=self._machine.world_size,
            accelerator=self._machine.accelerator(),
            data=self._data,
            deepspeed_json=content,
            deepspeed_name=name,
        )
        student = shell(self._student, MODEL_CLASSES[config.task.kind])
        teacher = None
        if self._teacher is not None and (config.teacher.kind == "online" or config.teacher.on_missing == "ask"):
            teacher = shell(self._teacher, MODEL_CLASSES[config.task.kind])
        counted = count_parameters(student)
        state = student_state_bytes(counted.total + _projection_parameters(config, student, teacher), run)
        cached = self._teacher if config.teacher.kind == "cached" and config.cache.codec.kind == "hidden" else None
        of_step = _step_parts(student, teacher, cached, run, self._data.sequence_tokens, self._machine.kind)
        parts = _state_parts(state) + of_step
        size = VALUE_BYTES[run.precision]
        master_and_moments = 8 if run.zero_stage == 0 and size == 4 else 12
        return Plan(
            run=run,
            data=self._data,
            deepspeed_name=name,
            student=counted,
            teacher=count_parameters(teacher) if teacher is not None else None,
            parts=(*parts, Part("context, libraries, fragmentation", RESERVE_BYTES[self._machine.kind])),
            host_bytes=state.host + _teacher_host_bytes(teacher, run),
            checkpoint_bytes=counted.total * (size + master_and_moments),
            flops_per_token=training_flops_per_token(
                student, teacher, self._data.sequence_tokens, _head_fraction(config), config.run.gradient_checkpointing
            ),
        )

    def remedies(self) -> list[tuple[str, Plan]]:
        """Settings that need less memory, the least costly in speed first, each with its plan.

        Smaller micro-batches end with the first that fits.
        """
        batch = self.plan().run.batch
        smaller = [size for size in range(batch.micro_sequences - 1, 0, -1) if batch.local_sequences % size == 0]
        changes = [f"batch.micro_sequences={size}" for size in smaller]
        changes += ["run.gradient_checkpointing=true", *zero_changes(self._config.zero)]
        changes += teacher_changes(self._config.teacher, self._machine.world_size)
        if smaller:
            changes.append(f"batch.micro_sequences={smaller[-1]} run.gradient_checkpointing=true")
        found: list[tuple[str, Plan]] = []
        for change in changes:
            if change.startswith("batch") and any(plan.fits(self._machine) for _, plan in found):
                continue
            try:
                found.append((change, self.plan(*change.split(" "))))
            except ConfigError:  # this change does not fit the rest of the run
                continue
        return found


def _teacher_config(config: RunConfig) -> PreTrainedConfig | None:
    teacher = config.teacher
    if teacher.model is None:
        return None
    return load_hf_config(
        teacher.model, "teacher.model", revision=teacher.revision, remote_code=teacher.trust_remote_code
    )


def _data_facts(config: RunConfig, vocab_size: int, num_samples: int | None, sequence_tokens: int | None) -> DataFacts:
    if num_samples is not None and sequence_tokens is not None:
        return DataFacts(num_samples, sequence_tokens, vocab_size, config.task.kind)
    try:
        manifest = ShardSet.open(config.data.manifest, allow_pipe=config.data.allow_pipe).manifest
    except DataError as problem:
        raise ConfigError(f"{problem}; to plan before there are shards, give --samples and --sequence-tokens") from None
    return DataFacts(
        num_samples or manifest.num_samples, sequence_tokens or manifest.sequence_tokens, vocab_size, manifest.task
    )


def _head_fraction(config: RunConfig) -> float:
    """Share of positions whose logits are formed: all, unless every term looks at masked ones alone."""
    everywhere = any(isinstance(term, LogitTerm) and term.restrict_to == "all" for term in config.losses)
    return 1.0 if everywhere or config.task.kind != "masked_lm" else config.task.mask_fraction


def _projection_parameters(config: RunConfig, student: PreTrainedModel, teacher: PreTrainedModel | None) -> int:
    """Weights that hidden terms train beside the student where the widths differ."""
    if teacher is None:
        return 0
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    if ours.hidden_size == theirs.hidden_size:
        return 0
    terms = [term for term in config.losses if isinstance(term, HiddenTerm)]
    pairs = [layer_pairs(term.layers, ours.num_hidden_layers, theirs.num_hidden_layers) for term in terms]
    return sum(len(each) for each in pairs) * ours.hidden_size * theirs.hidden_size


def _state_parts(state: StateBytes) -> list[Part]:
    return [
        Part("student weights", state.weights),
        Part("student gradients", state.gradients),
        Part("master weights and Adam moments", state.optimizer),
        Part("ZeRO buckets and gathered layers", state.buffers),
    ]


def _step_parts(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    cached: PreTrainedConfig | None,
    run: ResolvedRun,
    sequence_tokens: int,
    kind: str,
) -> list[Part]:
    """Memory that the teacher, the activations, the loss and the batch take. ``cached`` is the config of a teacher
    whose states a cache keeps."""
    config, micro = run.config, run.batch.micro_sequences
    tokens = micro * sequence_tokens
    known = teacher.config if teacher is not None else cached
    teacher_width = known.get_text_config().hidden_size if known is not None else None
    head = student.get_output_embeddings()
    if head is None:  # few classes: logits of both models, and what the terms make of them
        loss = FEW_CLASSES_ARRAYS * 4 * tokens * (student.config.num_labels or 2)
    else:
        loss = head_loss_bytes(
            config,
            num_rows=round(_head_fraction(config) * tokens),
            head=head.weight,
            teacher_width=teacher_width,
            precision=run.precision,
            kind=kind,
        )
    activations = activation_bytes(student, run.precision, micro, sequence_tokens, config.run.gradient_checkpointing)
    return [
        *(_teacher_parts(teacher, run, tokens) if teacher is not None else ()),
        *(_cached_parts(cached, run, tokens) if cached is not None and teacher is None else ()),
        Part("student activations", activations),
        Part("vocabulary head and loss", loss),
        Part("batch", tokens * BATCH_BYTES_PER_TOKEN),
    ]


def _cached_parts(teacher: PreTrainedConfig, run: ResolvedRun, tokens: int) -> list[Part]:
    """The head that a cache of states has, and the states of the layers that it keeps."""
    config, size, codec = teacher.get_text_config(), VALUE_BYTES[run.teacher_precision], run.config.cache.codec
    num_layers = len(codec.layers) if isinstance(codec, HiddenSection) else 0
    head = config.vocab_size * config.hidden_size * size
    return [Part("teacher head and states, cached", head + num_layers * tokens * config.hidden_size * size)]


def _teacher_host_bytes(teacher: PreTrainedModel | None, run: ResolvedRun) -> int:
    if teacher is None:
        return 0
    size = VALUE_BYTES[run.teacher_precision]
    return teacher_bytes(teacher, run.config.teacher, size, run.batch.world_size).host


def _teacher_parts(teacher: PreTrainedModel, run: ResolvedRun, tokens: int) -> list[Part]:
    """Weights, and the forward pass: one layer's tensors, and all layers' states when a term asks for them. With
    overlap the targets of the micro-batch before live meanwhile: its last state, and all layers' states as well."""
    config, size = teacher.config.get_text_config(), VALUE_BYTES[run.teacher_precision]
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    working = tokens * (2 * inner + 4 * config.hidden_size) * size
    has_hidden = any(isinstance(term, HiddenTerm) for term in run.config.losses)
    num_states = config.num_hidden_layers + 1 if has_hidden else 0
    if run.config.teacher.overlap:
        num_states += num_states + 1
    working += num_states * tokens * config.hidden_size * size
    weights = teacher_bytes(teacher, run.config.teacher, size, run.batch.world_size)
    gathered = [Part("teacher layers gathered", weights.gathered)] if weights.gathered else []
    return [Part("teacher weights", weights.weights), *gathered, Part("teacher forward pass", working)]
