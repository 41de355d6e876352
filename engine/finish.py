"""The end of a run, on one rank: the export, the scores of all models, the report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.cache.journal import fold
from engine.checkpoint import best, read_meta
from engine.compare import Contender, compare
from engine.config.run import RunConfig, StudentSection, TeacherSection
from engine.config.terms import CrossEntropy, Ramp, Term
from engine.dist import Control, Ranks
from engine.errors import ConfigError, StillhouseError
from engine.export import export_student, model_card, student_from_state
from engine.models import MODEL_CLASSES, load_model, move
from engine.parts import Parts, Place, build_parts
from engine.report import Results, results_table, write_report
from engine.runfolder import read_config
from engine.staging import newest_stage
from engine.tasks.tokenizer import load_tokenizer
from engine.teacher.placing import alone, load_teacher, place_alone
from engine.zero import consolidate

log = logging.getLogger("stillhouse")


def finish_run(parts: Parts, folder: Path, device: torch.device, finished: bool, alone: bool = False) -> None:
    """Export and score the student of a run that reached its end; write the report in any case. ``alone``: neither
    teacher nor control is scored beside it."""
    results = None
    if finished:
        student = load_student(folder, best(folder / "checkpoints"), parts.task.kind)
        results = score_student(student, parts, device, alone=alone)
        export_run(student, folder, folder / "export", parts.run.config, results)
    path = write_report(folder, results=results)
    log.info("report: %s", path)
    if parts.cache is not None and parts.run.config.teacher.on_missing == "ask":
        try:
            fold(parts.cache, parts.shards.manifest)
        except (OSError, StillhouseError) as problem:  # the run itself is done, and the answers stay in the journals
            log.warning("what the teacher was asked live is not in the cache yet: %s", problem)


def load_student(folder: Path, checkpoint: Path, task: str) -> PreTrainedModel:
    """The student of a checkpoint in fp32, with the config that its run folder keeps."""
    return student_from_state(consolidate(checkpoint, read_meta(checkpoint).get("sha256")), folder / "student", task)


def evaluate_run(
    folder: Path, checkpoint: Path | None, manifest: str | None, control: str | None, overrides: Sequence[str]
) -> list[str]:
    """Score a checkpoint (the best or newest, if None), write results and report, and give the lines of a table.

    Raises CheckpointError when there is no such checkpoint, ConfigError when there is no held-out text.
    """
    whole, folder = folder, newest_stage(folder)
    config = read_config(folder, ["run.precision=auto", "teacher.precision=auto", *overrides])
    config = _without_training(config)
    if not (manifest or config.evaluation.test_manifest or config.evaluation.manifest):
        raise ConfigError(f"{folder}: the run has no evaluation.manifest; give --manifest HELDOUT/manifest.json")
    checkpoint = checkpoint or best(folder / "checkpoints")
    read_meta(checkpoint)
    ranks = Ranks(0, 1, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = build_parts(config, Place(ranks, Control(ranks), device))
    results = score_student(load_student(folder, checkpoint, config.task.kind), parts, device, manifest, control)
    assert results is not None
    path = write_report(folder, results=results)
    if whole != folder:
        path = write_report(whole, results=results)
    return [*results_table(results), f"checkpoint: {checkpoint}", f"report: {path}"]


def _without_training(config: RunConfig) -> RunConfig:
    """The run as far as scoring needs it: on one rank, and without the cache, which may be gone by then."""
    update: dict[str, Any] = {"zero": {"zero_optimization": {"stage": 0}}}
    if config.teacher.kind == "cached":
        kind = "none" if config.teacher.model is None else "online"
        section = alone(config.teacher).model_copy(update={"kind": kind, "cache": None, "on_missing": "refuse"})
        if kind == "none":
            section = TeacherSection()
            update["losses"] = (CrossEntropy(kind="cross_entropy"),)
        update["teacher"] = section
    elif config.teacher.kind == "online":
        update["teacher"] = alone(config.teacher)
    return config.model_copy(update=update)


def score_student(
    student: PreTrainedModel,
    parts: Parts,
    device: torch.device,
    manifest: str | None = None,
    control: str | None = None,
    alone: bool = False,
) -> Results | None:
    """Score student, teacher and control on one rank. None when there is no held-out text."""
    config = parts.run.config
    manifest = manifest or config.evaluation.test_manifest or config.evaluation.manifest
    control = control or config.evaluation.control
    if manifest is None:
        return None
    contenders = []
    if not alone and (teacher := _teacher(parts, device)) is not None:
        contenders.append(Contender("teacher", "teacher", teacher))
    if not alone and control is not None:
        section = StudentSection(model=control, attention=config.student.attention)
        twin = load_model(section, MODEL_CLASSES[parts.task.kind], torch.float32, "evaluation.control")
        contenders.append(Contender("control", "control", move(twin, device)))
    contenders.append(Contender("student", "student", move(student, device)))
    ranks = Ranks(0, 1, 0)
    return compare(contenders, parts, Place(ranks, Control(ranks), device), manifest)


def _teacher(parts: Parts, device: torch.device) -> PreTrainedModel | None:
    """The teacher to compare with: also after a run from a cache, if its weights are named. One that all ranks had
    together is loaded again."""
    config = parts.run.config
    together = config.teacher.placement != "replicated"
    if not together and parts.teacher is not None:
        return parts.teacher
    section = alone(config.teacher)
    if section.model is None and config.evaluation.teacher is not None:
        section = TeacherSection(kind="online", model=config.evaluation.teacher)
    if section.model is None:
        return None
    model = load_teacher(section, MODEL_CLASSES[parts.task.kind])
    place_alone(model, section, parts.run.teacher_precision, device)
    return model


def export_run(
    student: PreTrainedModel,
    folder: Path,
    output: Path,
    config: RunConfig,
    results: Results | None,
    dtype: str = "fp32",
) -> Path:
    """The student as a Hugging Face folder with tokenizer and model card."""
    figures = {"parameters": f"{student.num_parameters():,}"}
    for model in results.models if results is not None else ():
        if model.perplexity is not None:
            figures[f"held-out perplexity, {model.name}"] = f"{model.perplexity:.2f}"
        if model.role == "student" and model.agreement is not None:
            figures["same first choice as the teacher"] = f"{model.agreement:.1%}"
    card = model_card(
        config.run.name, config.task.kind, config.teacher.model, [_line(t) for t in config.losses], figures
    )
    return export_student(student, config.task.kind, load_tokenizer(str(folder / "student")), output, card, dtype)


def _line(term: Term) -> str:
    settings = term.model_dump(exclude={"kind"})
    words = []
    for key, value in settings.items():
        ramp = getattr(term, key)
        words.append(f"{key} {ramp.start} to {ramp.end}" if isinstance(ramp, Ramp) else f"{key} {value}")
    return f"{term.model_dump()['kind']}: {', '.join(words)}"
