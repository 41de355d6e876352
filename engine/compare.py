"""Teacher, control and student side by side on held-out text: losses, agreement, speed, and what each would say."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from engine.config.terms import CrossEntropy
from engine.data.loader import Loader
from engine.data.shards import ShardSet
from engine.evaluation import Evaluation, Evaluator, EvenlySpaced, held_out_limit
from engine.losses.layers import Shape
from engine.losses.objective import Objective
from engine.parts import Parts, Place
from engine.predicting import Shower
from engine.report import ModelResult, Results
from engine.report.results import BATCH_SEQUENCES, Role
from engine.schema import Batch
from engine.student.module import StudentWithObjective
from engine.tasks.scores import Scores
from engine.tasks.task import check_heldout
from engine.teacher.online import OnlineTeacher
from engine.teacher.source import NoTeacher

NUM_TEXTS = 3
TIMED_PASSES, TIMED_SECONDS = 12, 10.0
"""Of the models together: as many passes as go into the time, and two at least."""


@dataclass(frozen=True)
class Contender:
    name: str
    role: Role
    model: PreTrainedModel


def compare(contenders: list[Contender], parts: Parts, place: Place, manifest: str) -> Results:
    """Score ``contenders`` on the held-out shards at ``manifest``. The teacher, if any, is asked live."""
    shards = ShardSet.open(manifest, allow_pipe=parts.run.config.data.allow_pipe)
    check_heldout(shards.manifest, parts.shards.manifest, manifest)
    teacher = next((c.model for c in contenders if c.role == "teacher"), None)
    evaluations = {
        c.name: _evaluate(c.model, teacher, shards, parts, place) for c in contenders if c.model is not teacher
    }
    one, many = (_first_batch(shards, parts, place, size) for size in (1, BATCH_SEQUENCES))
    seconds = {size: _pass_seconds(contenders, batch, parts) for size, batch in ((1, one), (BATCH_SEQUENCES, many))}
    results = []
    for contender in contenders:
        if contender.model is teacher:
            measured = next(iter(evaluations.values()))
            result = _result(contender, measured.teacher_loss, 1.0, measured.teacher)
        else:
            measured = evaluations[contender.name]
            result = _result(contender, measured.student_loss, measured.agreement, measured.student)
        batch_seconds = seconds[BATCH_SEQUENCES][contender.name]
        result = replace(
            result,
            latency_seconds=seconds[1][contender.name],
            batch_seconds=batch_seconds if many.input_ids.shape[0] == BATCH_SEQUENCES else None,
            tokens_per_second=many.input_ids.numel() / batch_seconds,
        )
        results.append(result)
    shower = Shower(parts.task, parts.tokenizer, shards.manifest.labels, shards.manifest.vocab_size)
    few = _first_batch(shards, parts, place, NUM_TEXTS)
    return Results(
        models=tuple(results),
        predictions=tuple(shower.predictions({c.name: c.model for c in contenders}, few)),
        origins=tuple(parts.student.origins),
        num_heldout_tokens=next(iter(evaluations.values())).num_labels,
    )


def _evaluate(
    model: PreTrainedModel, teacher: PreTrainedModel | None, shards: ShardSet, parts: Parts, place: Place
) -> Evaluation:
    objective = Objective(
        (CrossEntropy(kind="cross_entropy"),),
        num_steps=1,
        num_ids=shards.manifest.vocab_size,
        student=Shape(model.config.hidden_size, model.config.num_hidden_layers),
        teacher=None,
    )
    evaluator = Evaluator(
        shards,
        parts.task,
        objective,
        max_sequences=held_out_limit(parts.run.config),
        batch=parts.run.batch,
        control=place.control,
        device=place.device,
    )
    module = StudentWithObjective(model, objective, parts.task).eval()
    live = None if teacher is None else OnlineTeacher(teacher, parts.task, hidden_states=False)
    try:
        return evaluator.score(module, live or NoTeacher())
    finally:
        module.reader.release()
        if live is not None:
            live.reader.release()


def _first_batch(shards: ShardSet, parts: Parts, place: Place, size: int) -> Batch:
    """So many held-out texts, or all of fewer, spread over the shards."""
    counts = shards.manifest.samples_per_shard
    size = min(size, sum(counts))
    loader = Loader(
        shards, EvenlySpaced(counts, size), parts.task.label, num_steps=1, global_sequences=size, micro_sequences=size
    )
    (step,) = loader.steps()
    return step.micro_batches[0].to(place.device)


@torch.inference_mode()
def _pass_seconds(contenders: list[Contender], batch: Batch, parts: Parts) -> dict[str, float]:
    """Seconds of a forward pass over ``batch``: the fastest of several, taken in turns so that noise hits all alike."""
    best = {contender.name: math.inf for contender in contenders}
    began = time.perf_counter()
    for number in range(TIMED_PASSES):
        if number >= 2 and time.perf_counter() - began > TIMED_SECONDS:
            break
        for contender in contenders:
            inputs = parts.task.model_inputs(batch, contender.model)
            begin = time.perf_counter()
            contender.model(**inputs)
            if batch.input_ids.is_cuda:
                torch.cuda.synchronize()
            best[contender.name] = min(best[contender.name], time.perf_counter() - begin)
    return best


def _result(contender: Contender, loss: float | None, agreement: float | None, scores: Scores | None) -> ModelResult:
    parameters = list(contender.model.parameters())
    return ModelResult(
        name=contender.name,
        role=contender.role,
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        loss=loss,
        perplexity=None if loss is None or scores is not None else math.exp(min(loss, 700.0)),
        agreement=agreement,
        scores=scores,
    )
