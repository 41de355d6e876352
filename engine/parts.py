"""The models, the data and the task of a run, loaded and checked against each other. Knows nothing of DeepSpeed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.cache.folder import CacheFolder
from engine.cache.journal import fold
from engine.config.resolve import Accelerator, ResolvedRun, read_deepspeed_json, resolve
from engine.config.run import RunConfig, TeacherSection
from engine.data.client import CLIENT
from engine.data.manifest import Manifest
from engine.data.shards import ShardSet
from engine.dist import Control, Ranks
from engine.errors import CacheError, ConfigError, DataError, StillhouseError
from engine.losses.head import HeadTap, check_head, describe_head
from engine.models import DTYPES, MODEL_CLASSES
from engine.schema import map_tensors
from engine.sharing import read_by_main
from engine.student.build import BuiltStudent, build_student
from engine.student.freezing import freeze, freeze_fixed_positions
from engine.tasks.labelled_trial import check_few_classes
from engine.tasks.packing_trial import check_packing, check_positions, toy_inputs
from engine.tasks.task import Task, build_task
from engine.tasks.tokenizer import compare_tokenizers, load_tokenizer, vocab_size
from engine.teacher.fingerprint import fingerprint_teacher
from engine.teacher.opening import check_layers, join_cache, open_cache
from engine.teacher.placing import described_precision, load_teacher, place_alone

log = logging.getLogger("stillhouse")


@dataclass(frozen=True)
class Place:
    """Where this process runs."""

    ranks: Ranks
    control: Control
    device: torch.device


@dataclass(frozen=True)
class Parts:
    """What a run is made of before DeepSpeed takes the student."""

    run: ResolvedRun
    shards: ShardSet
    tokenizer: PreTrainedTokenizerBase
    task: Task
    student: BuiltStudent
    teacher: PreTrainedModel | None
    """one that is asked live; on its device, or on the host if all ranks must place it together"""
    cache: CacheFolder | None = None
    """what another was asked before"""

    @property
    def data_identity(self) -> dict[str, Any]:
        """What the order of the data depends on, and the cache: the same wherever the same files lie."""
        manifest = self.shards.manifest
        digest = hashlib.sha256(json.dumps([shard.sha256 for shard in manifest.shards]).encode()).hexdigest()
        identity: dict[str, Any] = {"shards_sha256": digest, "num_samples": manifest.num_samples}
        return identity if self.cache is None else identity | {"cache_sha256": self.cache.identity.sha256}


def accelerator_of(device: torch.device) -> Accelerator:
    """What ``device`` can train in, best first."""
    if device.type == "cpu":
        return Accelerator("cpu", ("fp32", "bf16"))
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Accelerator("cuda", ("bf16", "fp16", "fp32") if has_bf16 else ("fp16", "fp32"))


def check_run_against_data(config: RunConfig, place: Place) -> tuple[ResolvedRun, ShardSet]:
    """What can be refused before any model is loaded. Collective. Raises ConfigError and DataError."""
    CLIENT.set_patience(config.data.retry_seconds, config.data.server_timeout_seconds)
    shards = open_shards(config.data.manifest, config.data.allow_pipe, place)
    content, name = read_deepspeed_json(config.zero)
    run = resolve(
        config,
        world_size=place.ranks.world_size,
        accelerator=accelerator_of(place.device),
        data=shards.manifest.facts,
        deepspeed_json=content,
        deepspeed_name=name,
    )
    return run, shards


def build_parts(config: RunConfig, place: Place) -> Parts:
    """Resolve the run, load its models, and check that all of it fits together. Needs no DeepSpeed."""
    run, shards = check_run_against_data(config, place)
    manifest = shards.manifest
    log.info(
        "%s: %s steps of %s x %s tokens on %d %s; ZeRO-%d, %s",
        config.run.name,
        f"{run.num_steps:,}",
        f"{run.batch.global_sequences:,}",
        f"{manifest.sequence_tokens:,}",
        place.ranks.world_size,
        "rank" if place.ranks.world_size == 1 else "ranks",
        run.zero_stage,
        run.precision,
    )
    tokenizer = shared_tokenizer(config)
    counts = read_by_main(place.control, shards.token_counts, "the counts of the tokens", DataError)
    task = build_task(config.task, tokenizer, manifest, counts)
    model_class = MODEL_CLASSES[config.task.kind]
    asked = config.teacher.kind == "online" or config.teacher.on_missing == "ask"
    teacher = None
    if asked or config.student.init is not None:
        teacher = _load_teacher(config.teacher, model_class, place.control)
        _check_labels(teacher, manifest)
    cache = _cache(config, shards, place, run.teacher_precision, teacher) if config.teacher.kind == "cached" else None
    student = build_student(config.student, model_class, config.run.seed, teacher, manifest.labels)
    freeze_fixed_positions(student.model)
    if config.freeze:
        log.info("student: %s weights are not trained", f"{freeze(student.model, config.freeze):,}")
    if config.run.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    if not asked:
        teacher = None
    for model, role in ((student.model, "student"), (teacher, "teacher")):
        if model is not None:
            check_model(model, task, role, vocab_size(tokenizer), manifest)
            log.info("%s: %s, %s parameters", role, type(model).__name__, f"{model.num_parameters():,}")
    if teacher is not None and config.teacher.placement == "replicated":
        place_alone(teacher, config.teacher, run.teacher_precision, place.device)
    return Parts(run, shards, tokenizer, task, student, teacher, cache)


def open_shards(manifest_address: str, allow_pipe: bool, place: Place) -> ShardSet:
    """The shards; rank 0 reads the manifest for all. Collective."""
    packed = read_by_main(
        place.control, lambda: ShardSet.pack(manifest_address, allow_pipe=allow_pipe), manifest_address, DataError
    )
    return ShardSet.unpack(manifest_address, packed, allow_pipe=allow_pipe)


def _load_teacher(section: TeacherSection, model_class: str, control: Control) -> PreTrainedModel:
    """On all ranks or on none, where they will cut it together. Raises ConfigError."""
    if section.placement == "replicated":
        return load_teacher(section, model_class)
    teacher: PreTrainedModel | None = None
    problem: StillhouseError | None = None
    try:
        teacher = load_teacher(section, model_class)
    except StillhouseError as error:
        problem = error
    except Exception as error:  # a shared disk that is gone, no memory: the other ranks are about to wait for this one
        problem = ConfigError(f"teacher.model: cannot load {section.model!r}: {type(error).__name__}: {error}")
    told = [f"rank {rank}: {text}" for rank, text in enumerate(control.gather(problem and str(problem))) if text]
    if told:
        raise problem or ConfigError("; ".join(told))
    assert teacher is not None
    return teacher


def _cache(
    config: RunConfig, shards: ShardSet, place: Place, precision: str, teacher: PreTrainedModel | None
) -> CacheFolder:
    """The cache, checked against teacher.model if one is given: rank 0 reads the weights, and prepares it, for all."""

    def prepare() -> tuple[str, bytes, dict[str, bytes]]:
        fingerprint = None
        if config.teacher.on_missing == "ask" and teacher is not None:
            tap = HeadTap(teacher)
            tap.remove()
            head = describe_head(tap.module, teacher.config)
            check_layers(config, head, teacher.config)
            head = map_tensors(head, lambda tensor: tensor.to(DTYPES[precision]))
            joined = join_cache(config, shards, head, described_precision(config.teacher, precision))
            fold(joined, shards.manifest)
            fingerprint = joined.identity.teacher
        elif config.teacher.model is not None:
            fingerprint = fingerprint_teacher(config.teacher)
        return open_cache(config, shards.manifest, fingerprint).pack()

    what = f"the cache {config.teacher.cache} cannot be prepared"
    cache = CacheFolder.unpack(*read_by_main(place.control, prepare, what, CacheError))
    codec = cache.identity.codec["kind"]
    log.info("teacher: %s, from the cache %s (%s)", cache.identity.teacher_name, cache.address, codec)
    return cache


def shared_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer, after checking that student and teacher share it."""
    named = {"task.tokenizer": config.task.tokenizer, "teacher": config.teacher.model, "student": config.student.model}
    if not any(named.values()):
        raise ConfigError("no tokenizer: neither task.tokenizer, teacher.model nor student.model is given")
    found = {role: load_tokenizer(where) for role, where in named.items() if where}
    (first, tokenizer), *others = found.items()
    for role, other in others:
        compare_tokenizers(tokenizer, other, (first, role))
    return tokenizer


def _check_labels(teacher: PreTrainedModel, manifest: Manifest) -> None:
    known = tuple(str(label) for _, label in sorted((teacher.config.id2label or {}).items()))
    if manifest.labels and known != manifest.labels:
        raise ConfigError(
            f"teacher.model tells {len(known)} labels apart ({_some(known)}), the data has {len(manifest.labels)} "
            f"({_some(manifest.labels)}), in this order; fine-tune the teacher on shards with the same labels"
        )


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")


def check_model(model: PreTrainedModel, task: Task, role: str, num_ids: int, manifest: Manifest) -> None:
    """Raises ConfigError for a model whose packing, head or vocabulary does not do what the task needs."""
    check_positions(model, manifest.sequence_tokens)
    if not task.over_vocabulary:
        check_few_classes(model, task, role, num_ids, len(manifest.labels))
        return
    head = HeadTap(model)
    with head.removed():
        check_packing(model, task)
    if head.module.weight.shape[0] < num_ids:
        raise ConfigError(
            f"{role}: its head has {head.module.weight.shape[0]:,} rows, fewer than the tokenizer's {num_ids:,} ids"
        )
    check_head(model, head, toy_inputs(model, task), num_ids, role)
    head.remove()
