"""The one sentence at the top of the page, and the figures below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.measures import measure_name
from engine.report.quantities import count, duration, number, ratio, share
from engine.report.results import ModelResult, Results
from engine.report.series import last_value
from engine.tracking.records import Record


@dataclass(frozen=True)
class Tile:
    """A figure with its name above and what it is measured against below."""

    name: str
    figure: str
    against: str


def verdict(results: Results | None, records: Sequence[Record]) -> str:
    """What the student kept, in plain words; what is known so far when the run was stopped."""
    student = results.model("student") if results else None
    if results is None or student is None:
        return _verdict_so_far(records)
    teacher, control = results.model("teacher"), results.model("control")
    if student.quality is not None:
        return _verdict_by_measure(results, student, teacher, control)
    parts = []
    if teacher:
        size = _fraction(student.num_parameters, teacher.num_parameters)
        parts.append(f"With {share(size)} of the teacher's parameters, the student")
        if student.agreement is not None:
            parts.append(f"makes the same first choice {share(student.agreement)} of the time and")
        parts.append(f"reaches a held-out perplexity of {number(student.perplexity)}")
        if (times := _fraction(student.perplexity, teacher.perplexity)) is not None:
            parts.append(f"against {number(teacher.perplexity)}: {ratio(times)} the teacher's")
    else:
        parts.append(f"The student reaches a held-out perplexity of {number(student.perplexity)}")
    return " ".join(parts) + "." + _against_control(student, control)


def _verdict_by_measure(
    results: Results, student: ModelResult, teacher: ModelResult | None, control: ModelResult | None
) -> str:
    name = measure_name(results.measures[0])
    if teacher is None or results.retained is None:
        text = f"The student reaches a held-out {name} of {share(student.quality)}."
    else:
        size = _fraction(student.num_parameters, teacher.num_parameters)
        kept = f"{share(results.retained)} of its {name}: {share(student.quality)} against {share(teacher.quality)}"
        text = f"With {share(size)} of the teacher's parameters, the student keeps {kept}."
    if control is None or control.quality is None or student.quality is None:
        return text
    stays = "stays at" if control.quality < student.quality else "does no worse:"
    return f"{text} The same student trained without a teacher {stays} {share(control.quality)}."


def _against_control(student: ModelResult, control: ModelResult | None) -> str:
    if control is None or student.perplexity is None or control.perplexity is None:
        return ""
    if student.perplexity < control.perplexity:
        return f" The same student trained without a teacher stays at {number(control.perplexity)}."
    return f" The same student trained without a teacher does no worse: {number(control.perplexity)}."


def _verdict_so_far(records: Sequence[Record]) -> str:
    for measure in ("f1", "accuracy"):
        if (reached := last_value(records, f"eval/student_{measure}")) is not None:
            return f"At the last evaluation the student's held-out {measure_name(measure)} was {share(reached)}."
    student = last_value(records, "eval/student_perplexity")
    teacher = last_value(records, "eval/teacher_perplexity")
    if student is not None:
        beside = f" The teacher's is {number(teacher)}." if teacher is not None else ""
        return f"At the last evaluation the student's held-out perplexity was {number(student)}.{beside}"
    loss = last_value(records, "loss/objective")
    if loss is not None:
        return f"Not evaluated yet. The objective was {number(loss)} at the last record."
    return "Nothing was recorded yet."


def tiles(results: Results | None) -> list[Tile]:
    """Empty without results; a tile whose figure was not measured is left out."""
    student = results.model("student") if results else None
    if results is None or student is None:
        return []
    teacher, control = results.model("teacher"), results.model("control")
    found = [_quality(results, student, teacher) if student.quality is not None else _perplexity(student, teacher)]
    if student.agreement is not None:
        found.append(Tile("Agreement", share(student.agreement), "same first choice as the teacher"))
    if teacher:
        found.append(_size(student, teacher))
        if (speed := _fraction(teacher.latency_seconds, student.latency_seconds)) is not None:
            latencies = f"{duration(student.latency_seconds)} a sequence, teacher {duration(teacher.latency_seconds)}"
            found.append(Tile("Speed", ratio(speed), latencies))
    if teacher and control and (closed := _gap_closed(student, teacher, control)) is not None:
        found.append(Tile("Gap closed", share(closed), "of the loss between control and teacher"))
    return found


def _quality(results: Results, student: ModelResult, teacher: ModelResult | None) -> Tile:
    against = "on held-out data"
    if teacher and results.retained is not None:
        against = f"teacher {share(teacher.quality)}, so {share(results.retained)} of it kept"
    return Tile(measure_name(results.measures[0]), share(student.quality), against)


def _perplexity(student: ModelResult, teacher: ModelResult | None) -> Tile:
    times = _fraction(student.perplexity, teacher.perplexity) if teacher else None
    against = f"teacher {number(teacher.perplexity)}, so {ratio(times)}" if teacher and times else "on held-out text"
    return Tile("Perplexity", number(student.perplexity), against)


def _size(student: ModelResult, teacher: ModelResult) -> Tile:
    size = share(_fraction(student.num_parameters, teacher.num_parameters))
    return Tile("Size", size, f"{count(student.num_parameters)} of {count(teacher.num_parameters)} parameters")


def _gap_closed(student: ModelResult, teacher: ModelResult, control: ModelResult) -> float | None:
    if student.loss is None or teacher.loss is None or control.loss is None or control.loss <= teacher.loss:
        return None
    return (control.loss - student.loss) / (control.loss - teacher.loss)


def _fraction(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
