"""Settings of one run that contradict each other, or that would silently do nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine.config.measures import MEASURES
from engine.config.run import RunConfig, ScheduleSection, TaskSection, TeacherSection
from engine.config.terms import AttentionTerm, LogitTerm, Ramp, RelationTerm, Term
from engine.errors import ConfigError

LABEL_TERMS = frozenset({"cross_entropy"})
"""Terms that need no teacher."""

FROZEN_PARTS = "embeddings, word_ position_ or token_type_embeddings, layers, layers 3, layers 0-5, encoder, head"
FROZEN_PART = re.compile(r"((word|position|token_type)_)?embeddings|encoder|head|layers(\s+\d+(\s*-\s*\d+)?)?")

_SCHEDULE_SETTINGS = {
    "final_fraction": ("linear", "cosine", "wsd", "plateau"),
    "decay_steps": ("wsd",),
    "milestones": ("multi_step",),
    "factor": ("multi_step", "plateau"),
    "patience": ("plateau",),
}
"""Which kinds of schedule read the setting."""


def check_run(config: RunConfig, num_steps: int) -> None:
    """Raises ConfigError with every contradiction in ``config``, one a line."""
    checks = (
        _teacher(config),
        _placement(config.teacher),
        _quantize(config.teacher),
        _attention(config),
        _ramps(config, num_steps),
        _schedule(config, num_steps),
        _evaluation(config),
        _early_stop(config),
        _masking(config),
        _freeze(config),
        _even_pairs(config),
        _few_classes(config),
    )
    if found := [problem for check in checks for problem in check]:
        raise ConfigError("\n".join(found))


def check_cache(config: RunConfig) -> None:
    """Raises ConfigError when ``config`` does not say which cache to make of which teacher."""
    teacher = config.teacher
    if teacher.model is None or teacher.cache is None:
        raise ConfigError(
            f"to make a cache give teacher.model and teacher.cache (found model {teacher.model}, cache "
            f"{teacher.cache}); with teacher.kind: cached the same file then trains from it"
        )
    if teacher.placement != "replicated":
        raise ConfigError(
            f"teacher.placement: {teacher.placement} cannot fill a cache: each rank is a job of its own there; use "
            "placement: replicated, with offload: cpu or quantize: int8 if the teacher is too large"
        )


def _teacher(config: RunConfig) -> Iterator[str]:
    compared = [f"losses.{i} ({term.kind})" for i, term in enumerate(config.losses) if term.kind not in LABEL_TERMS]
    if config.teacher.kind == "none":
        if compared:
            yield (
                f"teacher.kind is none, but {', '.join(compared)} needs a teacher; "
                "set teacher.kind and teacher.model, or keep cross_entropy alone"
            )
        if config.student.init is not None:
            yield f"student.init: {config.student.init} needs a teacher's weights; set teacher.kind and teacher.model"
    elif config.student.init is not None and config.teacher.model is None:
        yield f"student.init: {config.student.init} needs weights; give teacher.model beside teacher.cache"
    elif not compared and config.student.init is None:
        yield "no term compares with the teacher, which would run for nothing; add one, or set teacher.kind: none"


def _placement(teacher: TeacherSection) -> Iterator[str]:
    if teacher.kind == "none":
        for name, idle in (("placement", "replicated"), ("offload", "none"), ("quantize", "none"), ("overlap", False)):
            if getattr(teacher, name) != idle:
                yield f"teacher.{name}: {getattr(teacher, name)} has no effect with teacher.kind: none; remove it"
        return
    if teacher.kind == "cached":
        if teacher.overlap:
            yield "teacher.overlap has no effect with teacher.kind: cached, whose targets are read ahead; remove it"
        if teacher.placement != "replicated":
            yield (
                f"teacher.placement: {teacher.placement} needs all ranks at each question, and a cached teacher is "
                "asked by one rank alone; use placement: replicated, with offload: cpu if it is too large"
            )
        return
    if teacher.overlap and teacher.placement != "replicated":
        yield (
            f"teacher.overlap needs placement: replicated, found {teacher.placement}: its messages between ranks would "
            "mix with the student's; set teacher.overlap: false"
        )
    if teacher.offload == "cpu" and teacher.placement == "tensor_parallel":
        yield "teacher.offload: cpu does not go with placement: tensor_parallel; use placement: zero3"


def _attention(config: RunConfig) -> Iterator[str]:
    found = [
        f"losses.{i} ({t.kind})" for i, t in enumerate(config.losses) if isinstance(t, AttentionTerm | RelationTerm)
    ]
    if found and config.teacher.placement == "tensor_parallel":
        yield f"{', '.join(found)} needs whole heads, which placement: tensor_parallel cuts; use replicated or zero3"


def _quantize(teacher: TeacherSection) -> Iterator[str]:
    if teacher.quantize != "none" and (teacher.placement != "replicated" or teacher.offload != "none"):
        yield (
            f"teacher.quantize: {teacher.quantize} needs placement: replicated and offload: none, found "
            f"{teacher.placement} and {teacher.offload}; quantised weights are neither cut nor moved"
        )


def _ramps(config: RunConfig, num_steps: int) -> Iterator[str]:
    for name, ramp in _all_ramps(config.losses):
        if ramp.from_step >= num_steps:
            yield f"{name}.from_step = {ramp.from_step} is not within the run's {num_steps} steps"
        elif ramp.to_step is not None and ramp.to_step > num_steps:
            yield f"{name}.to_step = {ramp.to_step} is beyond the run's {num_steps} steps; leave it out to end there"


def _all_ramps(terms: tuple[Term, ...]) -> Iterator[tuple[str, Ramp]]:
    for index, term in enumerate(terms):
        for field in ("weight", "temperature"):
            value = getattr(term, field, None)
            if isinstance(value, Ramp):
                yield f"losses.{index}.{field}", value


def _schedule(config: RunConfig, num_steps: int) -> Iterator[str]:
    schedule = config.schedule
    for name in _changed(schedule):
        kinds = _SCHEDULE_SETTINGS.get(name)
        if kinds is not None and schedule.kind not in kinds:
            yield f"schedule.{name} has no effect with schedule.kind: {schedule.kind}; it is for {' and '.join(kinds)}"
    if schedule.warmup_steps >= num_steps:
        yield f"schedule.warmup_steps = {schedule.warmup_steps} takes all of the run's {num_steps} steps"
    if schedule.kind == "wsd" and schedule.warmup_steps + (schedule.decay_steps or 0) > num_steps:
        yield (
            f"schedule.warmup_steps + schedule.decay_steps = {schedule.warmup_steps} + {schedule.decay_steps} "
            f"is more than the run's {num_steps} steps"
        )
    if schedule.kind == "multi_step":
        yield from _milestones(schedule, num_steps)
    if schedule.kind == "plateau" and (config.evaluation.manifest is None or config.evaluation.every_steps is None):
        yield "schedule.kind: plateau follows the held-out loss; set evaluation.manifest and evaluation.every_steps"


def _milestones(schedule: ScheduleSection, num_steps: int) -> Iterator[str]:
    milestones = schedule.milestones
    if not milestones:
        yield "schedule.kind: multi_step needs schedule.milestones, the steps at which the rate falls"
    elif list(milestones) != sorted(set(milestones)):
        yield f"schedule.milestones must rise, found {list(milestones)}"
    elif milestones[-1] >= num_steps:
        yield f"schedule.milestones: {milestones[-1]} is not within the run's {num_steps} steps"


def _evaluation(config: RunConfig) -> Iterator[str]:
    if config.evaluation.every_steps is not None and config.evaluation.manifest is None:
        yield f"evaluation.every_steps = {config.evaluation.every_steps}, but there is no evaluation.manifest to score"


def _early_stop(config: RunConfig) -> Iterator[str]:
    if config.early_stop is None:
        return
    if config.evaluation.manifest is None or config.evaluation.every_steps is None:
        yield "early_stop looks at held-out data; set evaluation.manifest and evaluation.every_steps"
    known = MEASURES[config.task.kind]
    if config.early_stop.measure not in (None, *known):
        yield f"early_stop.measure: {config.early_stop.measure}: {config.task.kind} is measured by {', '.join(known)}"


def _masking(config: RunConfig) -> Iterator[str]:
    if config.task.kind == "masked_lm":
        return
    for name in _changed(config.task):
        if name.startswith("mask_"):
            yield f"task.{name} has no effect with task.kind: {config.task.kind}"


def _freeze(config: RunConfig) -> Iterator[str]:
    """Names alone: whether the student has the part is known when it is built."""
    for part in config.freeze:
        if not FROZEN_PART.fullmatch(part):
            yield f"freeze: there is no part {part!r}; the parts are {FROZEN_PARTS}"


def _even_pairs(config: RunConfig) -> Iterator[str]:
    if config.teacher.even_pairs and (
        config.teacher.kind != "online" or config.task.kind not in ("masked_lm", "causal_lm")
    ):
        yield (
            "teacher.even_pairs evens out what an online teacher says of the vocabulary; it needs teacher.kind: online "
            f"and task.kind: masked_lm or causal_lm, found {config.teacher.kind} and {config.task.kind}"
        )


def _few_classes(config: RunConfig) -> Iterator[str]:
    """What tasks with labels of their own cannot do, or not yet."""
    task, teacher = config.task.kind, config.teacher
    if task in ("masked_lm", "causal_lm"):
        return
    if teacher.kind == "cached":
        yield f"teacher.kind: cached keeps answers over the vocabulary, not those of {task}; use teacher.kind: online"
    if teacher.placement != "replicated" or teacher.offload != "none":
        yield (
            f"{task} needs teacher.placement: replicated and teacher.offload: none, found {teacher.placement} and "
            f"{teacher.offload}"
        )
    for i, term in enumerate(config.losses):
        if isinstance(term, LogitTerm) and term.restrict_to == "all":
            yield f"losses.{i}.restrict_to: all is for tasks over the vocabulary; {task} has logits where it has labels"
        if term.kind == "logits_mse" and task == "question_answering":
            yield f"losses.{i}: logits_mse compares classes, and those of question_answering are the places of a text"


def _changed(section: TaskSection | ScheduleSection) -> list[str]:
    """Settings that are not their defaults. Not those that are given: a saved run gives them all."""
    fields = type(section).model_fields
    return [
        name for name, field in fields.items() if not field.is_required() and getattr(section, name) != field.default
    ]
