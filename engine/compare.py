"""Teacher, control and student side by side on held-out text: losses, agreement, speed, and what each would say."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from engine.config.terms import CrossEntropy
from engine.data.loader import Loader
from engine.data.shards import ShardSet
from engine.evaluation import Evaluation, Evaluator, EvenlySpaced
from engine.losses.objective import Objective, Shape
from engine.parts import Parts, Place
from engine.report import ModelResult, Prediction, Results, Word
from engine.report.results import Role
from engine.schema import Batch
from engine.student.module import StudentWithObjective
from engine.teacher.online import OnlineTeacher
from engine.teacher.source import NoTeacher

NUM_TEXTS, POSITIONS_PER_TEXT, NUM_GUESSES = 3, 2, 5
CONTEXT_TOKENS = 40
TIMED_PASSES = 12


@dataclass(frozen=True)
class Contender:
    name: str
    role: Role
    model: PreTrainedModel


def compare(contenders: list[Contender], parts: Parts, place: Place, manifest: str) -> Results:
    """Score ``contenders`` on the held-out shards at ``manifest``. The teacher, if any, is asked live."""
    shards = ShardSet.open(manifest, allow_pipe=parts.run.config.data.allow_pipe)
    teacher = next((c.model for c in contenders if c.role == "teacher"), None)
    evaluations = {
        c.name: _evaluate(c.model, teacher, shards, parts, place) for c in contenders if c.model is not teacher
    }
    batch = _first_batch(shards, parts, place)
    seconds = _pass_seconds(contenders, batch, parts)
    results = []
    for contender in contenders:
        if contender.model is teacher:
            measured = next(iter(evaluations.values()))
            scores: tuple[float | None, float | None] = (measured.teacher_loss, 1.0)
        else:
            measured = evaluations[contender.name]
            scores = (measured.student_loss, measured.agreement)
        results.append(_result(contender, *scores, batch, seconds[contender.name]))
    return Results(
        models=tuple(results),
        predictions=tuple(_predictions(contenders, batch, parts)),
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
        max_sequences=parts.run.config.evaluation.max_sequences,
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


def _first_batch(shards: ShardSet, parts: Parts, place: Place) -> Batch:
    """A few held-out texts, spread over the shards."""
    counts = shards.manifest.samples_per_shard
    size = min(NUM_TEXTS, sum(counts))
    loader = Loader(
        shards, EvenlySpaced(counts, size), parts.task.label, num_steps=1, global_sequences=size, micro_sequences=size
    )
    (step,) = loader.steps()
    return step.micro_batches[0].to(place.device)


@torch.inference_mode()
def _pass_seconds(contenders: list[Contender], batch: Batch, parts: Parts) -> dict[str, float]:
    """Seconds of a forward pass over ``batch``: the fastest of several, taken in turns so that noise hits all alike."""
    best = {contender.name: math.inf for contender in contenders}
    for _ in range(TIMED_PASSES):
        for contender in contenders:
            inputs = parts.task.model_inputs(batch, contender.model)
            begin = time.perf_counter()
            contender.model(**inputs)
            if batch.input_ids.is_cuda:
                torch.cuda.synchronize()
            best[contender.name] = min(best[contender.name], time.perf_counter() - begin)
    return best


def _result(
    contender: Contender, loss: float | None, agreement: float | None, batch: Batch, seconds: float
) -> ModelResult:
    parameters = list(contender.model.parameters())
    return ModelResult(
        name=contender.name,
        role=contender.role,
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        loss=loss,
        perplexity=None if loss is None else math.exp(min(loss, 700.0)),
        agreement=agreement,
        latency_seconds=seconds / batch.input_ids.shape[0],
        tokens_per_second=batch.input_ids.numel() / seconds,
    )


@torch.inference_mode()
def _predictions(contenders: list[Contender], batch: Batch, parts: Parts) -> list[Prediction]:
    """The likeliest words of each model at a few labelled positions."""
    logits = {c.name: c.model(**parts.task.model_inputs(batch, c.model)).logits for c in contenders}
    num_ids = parts.shards.manifest.vocab_size
    predictions = []
    for text in range(batch.input_ids.shape[0]):
        positions = (batch.labels[text] != -100).nonzero().flatten().tolist()
        for part in range(1, POSITIONS_PER_TEXT + 1):
            position = positions[part * (len(positions) - 1) // (POSITIONS_PER_TEXT + 1)]
            guesses = {}
            for name, scores in logits.items():
                best = scores[text, position, :num_ids].float().softmax(0).topk(min(NUM_GUESSES, num_ids))
                guesses[name] = tuple(
                    Word(_text([index], parts), probability)
                    for probability, index in zip(best.values.tolist(), best.indices.tolist())
                )
            before, after = _context(batch, text, position, parts)
            truth = _text([int(batch.labels[text, position])], parts)
            predictions.append(Prediction(before, truth, after, guesses))
    return predictions


def _context(batch: Batch, text: int, position: int, parts: Parts) -> tuple[str, str]:
    """The words around a position, of its own document. A causal model's position is the one before the word."""
    same = batch.segment_ids[text] == batch.segment_ids[text, position]
    ids = batch.input_ids[text]
    causal = parts.task.kind == "causal_lm"
    first = max(0, position - CONTEXT_TOKENS)
    end = position + 1 if causal else position
    before = [int(i) for i, inside in zip(ids[first:end], same[first:end]) if inside]
    last = position + CONTEXT_TOKENS
    after = (
        [] if causal else [int(i) for i, inside in zip(ids[position + 1 : last], same[position + 1 : last]) if inside]
    )
    return _text(before, parts), "" if causal else _text(after, parts)


def _text(ids: list[int], parts: Parts) -> str:
    return str(parts.tokenizer.decode(ids))
