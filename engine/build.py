"""From parts to a trainer: everything is made here and handed over finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from engine.cache.journal import Journal, records_kept
from engine.cache.recording import build_recorder
from engine.callbacks import Callback, Callbacks
from engine.checkpoint import CheckpointStore
from engine.config.run import RunConfig
from engine.cost import peak_flops, training_flops_per_token
from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.dist import StopSignal
from engine.evaluation import Evaluator, held_out_limit
from engine.losses.layers import Shape
from engine.losses.objective import Objective
from engine.metrics import RecordMaker
from engine.parts import Parts, Place, open_shards
from engine.placement import place_teacher
from engine.redaction import redact_all
from engine.resume import load_checkpoint, open_run_folder
from engine.sharing import read_by_main
from engine.state import TrainState
from engine.student.module import StudentWithObjective
from engine.tasks.task import check_heldout
from engine.teacher.ahead import InTurn, OneAhead
from engine.teacher.cached import CachedTargets, Live
from engine.teacher.online import OnlineTeacher
from engine.teacher.source import NoTeacher, TargetSource
from engine.tracking import Tracker
from engine.trainer import Trainer
from engine.watch import Watch
from engine.zero import StudentEngine


def build_trainer(
    parts: Parts,
    place: Place,
    resume: str,
    stop: StopSignal,
    watch: Watch,
    show: Callable[..., None],
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """The trainer, resumed from a checkpoint where there is one. Collective."""
    run, config = parts.run, parts.run.config
    folder = Path(config.run.output) / config.run.name
    manifest = parts.shards.manifest
    torch.manual_seed(config.run.seed)  # projections, the same on every rank
    objective = Objective(
        config.losses,
        num_steps=run.num_steps,
        num_ids=manifest.vocab_size,
        student=_shape(parts.student.model),
        teacher=_teacher_shape(parts),
    )
    evaluator = _evaluator(parts, objective, place)
    # nothing of the config is left to refuse: from here on the folder belongs to this run
    store = CheckpointStore(folder / "checkpoints", place.control, config.checkpoint.keep)
    checkpoint = open_run_folder(folder, store, parts, place, resume)
    watch.check = store.incarnation.check
    flops = _flops_per_token(parts, objective)  # before the teacher is cut
    source: TargetSource = NoTeacher()
    cached = None
    if parts.cache is not None:
        source = cached = CachedTargets(parts.cache, manifest, config.teacher.tail, place.device, _live(parts, place))
    elif parts.teacher is not None and objective.needs_targets:
        source = place_teacher(
            parts,
            place,
            hidden_states=objective.needs_hidden_states,
            attention_layers=objective.comparisons.attention_layers(1),
        )
    ahead = config.teacher.overlap and place.device.type == "cuda" and objective.needs_targets
    torch.manual_seed(config.run.seed + place.ranks.rank)  # dropout differs over the ranks
    module = StudentWithObjective(parts.student.model, objective, parts.task)
    engine = StudentEngine(module, run.deepspeed, config.optimizer, head_loss=objective.head_loss, head=module.head)
    state, num_bad = TrainState(), 0
    if checkpoint is not None:
        state, num_bad = load_checkpoint(checkpoint, engine, parts, place)
    store.begin_history(state.step)
    tracker = Tracker(
        folder,
        config.tracking,
        config.run.name,
        redact_all(config.model_dump(mode="json")),
        state.step,
        place.control.is_main,
    )
    meta = {"data": parts.data_identity, "zero_stage": run.zero_stage, "precision": run.precision}
    return Trainer(
        run=run,
        device=place.device,
        engine=engine,
        objective=objective,
        source=source,
        turns=(OneAhead if ahead else InTurn)(source, objective.rows, place.device),
        loader=_loader(parts, place, num_bad, cached),
        evaluator=evaluator,
        store=store,
        tracker=tracker,
        control=place.control,
        stop=stop,
        watch=watch,
        records=_records(parts, place, objective, flops),
        show_progress=show,
        callbacks=Callbacks(callbacks if place.control.is_main else ()),
        checkpoint_meta=meta,
        state=state,
    )


def _records(parts: Parts, place: Place, objective: Objective, flops_per_token: float) -> RecordMaker:
    run = parts.run
    return RecordMaker(
        objective,
        num_steps=run.num_steps,
        world_size=place.ranks.world_size,
        device=place.device,
        flops_per_token=flops_per_token,
        peak_flops=_peak(place.device, run.precision),
        has_labels=parts.shards.manifest.has_labels,
        over_vocabulary=parts.task.over_vocabulary,
    )


def _flops_per_token(parts: Parts, objective: Objective) -> float:
    masked_only = parts.task.kind == "masked_lm" and not objective.all_tokens
    return training_flops_per_token(
        parts.student.model,
        parts.teacher if objective.needs_targets else None,
        sequence_tokens=parts.shards.manifest.sequence_tokens,
        head_positions_fraction=parts.run.config.task.mask_fraction if masked_only else 1.0,
    )


def _loader(parts: Parts, place: Place, num_bad_samples: int, cached: CachedTargets | None) -> Loader:
    run, data = parts.run, parts.run.config.data
    order = DataOrder(
        parts.shards.manifest.samples_per_shard,
        seed=run.config.run.seed,
        lanes=data.lanes,
        shuffle_samples=data.shuffle_samples,
        epoch_samples=data.epoch_samples,
        sort_samples=data.sort_samples,
        lengths=parts.shards.lengths,
    )
    return Loader(
        parts.shards,
        order,
        parts.task.label,
        num_steps=run.num_steps,
        global_sequences=run.batch.global_sequences,
        micro_sequences=run.batch.micro_sequences,
        rank=place.ranks.rank,
        world_size=place.ranks.world_size,
        reader_threads=data.reader_threads,
        prefetch_steps=data.prefetch_steps,
        max_bad_samples=data.max_bad_samples,
        num_bad_samples=num_bad_samples,
        pin_memory=place.device.type == "cuda",
        one_width=_one_width(run.config),
        cached=cached,
    )


def _evaluator(parts: Parts, objective: Objective, place: Place) -> Evaluator | None:
    section = parts.run.config.evaluation
    if section.test_manifest is not None:  # scored at the end: what is wrong with it is told now
        test = open_shards(section.test_manifest, parts.run.config.data.allow_pipe, place)
        check_heldout(test.manifest, parts.shards.manifest, section.test_manifest)
    if section.manifest is None:
        return None
    shards = open_shards(section.manifest, parts.run.config.data.allow_pipe, place)
    check_heldout(shards.manifest, parts.shards.manifest, section.manifest)
    return Evaluator(
        shards,
        parts.task,
        objective,
        max_sequences=held_out_limit(parts.run.config),
        batch=parts.run.batch,
        control=place.control,
        device=place.device,
        one_width=_one_width(parts.run.config),
    )


def _one_width(config: RunConfig) -> bool:
    """The ranks of a group exchange their inputs, which takes one shape."""
    return config.teacher.placement == "tensor_parallel"


def _live(parts: Parts, place: Place) -> Live | None:
    """The teacher that is asked for what the cache lacks."""
    cache, manifest = parts.cache, parts.shards.manifest
    if parts.teacher is None or cache is None:
        return None
    places = read_by_main(place.control, lambda: records_kept(cache, manifest), f"{cache.address}: its journal")
    section = parts.run.config.cache
    layers = getattr(section.codec, "layers", ())
    teacher = OnlineTeacher(parts.teacher, parts.task, hidden_states=bool(layers))
    recorder = build_recorder(section, cache.ranks(), teacher.head, manifest.vocab_size)
    return Live(teacher, recorder, Journal(cache, manifest, places))


def _teacher_shape(parts: Parts) -> Shape | None:
    """Of a cache's teacher no more is known than the layers that it keeps."""
    if parts.cache is not None and parts.cache.identity.head_sha256 is not None:
        layers = parts.cache.identity.codec["layers"]
        return Shape(parts.cache.head().weight.shape[1], max(layers, default=0))
    return None if parts.teacher is None else _shape(parts.teacher)


def _shape(model: PreTrainedModel) -> Shape:
    config = model.config.get_text_config()
    return Shape(config.hidden_size, config.num_hidden_layers, config.num_attention_heads)


def _peak(device: torch.device, precision: str) -> float | None:
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
