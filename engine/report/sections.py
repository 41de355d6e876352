"""What of the records is drawn, and what is told instead where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from engine.report.charts import Chart, Level, Line, line_chart
from engine.report.quantities import MISSING, count, duration, share, size_tick, tick
from engine.report.results import Results
from engine.report.series import last_value, metric_names, series, step_seconds
from engine.tracking.records import Record

STUDENT, TEACHER, CONTROL = 0, 1, 2
"""Each model has one colour on the whole page."""

TERM_COLOURS = (3, 2, 4, 5, 1)

PHASE_NAMES = {
    "data": "waiting for data",
    "teacher": "teacher",
    "student": "student, forward and backward",
    "optimizer": "optimizer",
    "rest": "evaluation, checkpoints, rest",
}


@dataclass(frozen=True)
class Phase:
    """A piece of the bar of a step's time."""

    name: str
    seconds: str
    share: str
    percent: float
    colour: int


def learning_charts(records: Sequence[Record], results: Results | None) -> list[Chart]:
    """The objective with its weighted terms, each raw term, the held-out loss, and how close the student comes."""
    charts = [*_objective_chart(records), *_term_charts(records), *_heldout_chart(records, results)]
    agreement = [
        Line("training", series(records, "agreement/top1"), STUDENT),
        Line("held-out", series(records, "eval/agreement"), 3),
    ]
    if any(len(line.series) for line in agreement):
        charts.append(
            line_chart(
                "Agreement with the teacher",
                agreement,
                y_label="share of same first choices",
                y_format=_percent_tick,
                from_zero=True,
            )
        )
    closeness = [
        Line("training", series(records, "kl/temperature_1"), STUDENT),
        Line("held-out", series(records, "eval/kl"), 3),
    ]
    if any(len(line.series) for line in closeness):
        charts.append(line_chart("KL(teacher ‖ student) at temperature 1", closeness, y_label="nats a token"))
    return charts


def _objective_chart(records: Sequence[Record]) -> list[Chart]:
    weighted = [name for name in metric_names(records, "loss") if name.endswith("_weighted")]
    lines = [Line("objective", series(records, "loss/objective"), 0)]
    if len(weighted) > 1:
        for i, name in enumerate(weighted):
            label = f"{name.removesuffix('_weighted')} × weight"
            lines.append(Line(label, series(records, f"loss/{name}"), TERM_COLOURS[i % len(TERM_COLOURS)]))
    lines = [line for line in lines if len(line.series)]
    return [line_chart("Objective", lines, y_label="loss")] if lines else []


def _term_charts(records: Sequence[Record]) -> list[Chart]:
    charts = []
    for name in metric_names(records, "loss"):
        curve = series(records, f"loss/{name}")
        if name != "objective" and not name.endswith("_weighted") and len(curve):
            lines = [Line("training", curve, STUDENT)]
            charts.append(line_chart(f"Term {name}", lines, y_label=_term_unit(name)))
    return charts


def _term_unit(name: str) -> str:
    if "cosine" in name:
        return "1 − cosine"
    if "mse" in name:
        return "squared difference"
    return "probability" if "variation" in name else "nats a token"


def _heldout_chart(records: Sequence[Record], results: Results | None) -> list[Chart]:
    student = series(records, "eval/student_loss")
    if not len(student):
        return []
    levels = []
    teacher, control = (results.model("teacher"), results.model("control")) if results else (None, None)
    teacher_loss = teacher.loss if teacher else last_value(records, "eval/teacher_loss")
    if teacher_loss is not None:
        levels.append(Level("teacher", teacher_loss, TEACHER))
    if control and control.loss is not None:
        levels.append(Level("control, at its end", control.loss, CONTROL))
    lines = [Line("student", student, STUDENT)]
    return [line_chart("Held-out loss", lines, levels=levels, y_label="nats a token")]


def machine_charts(records: Sequence[Record]) -> list[Chart]:
    """Speed, memory and what the optimizer does."""
    wanted = (
        ("Throughput", "throughput/tokens_per_second", "tokens/s", tick, True),
        ("Model FLOPs utilisation", "throughput/mfu", "share of the device's peak", _percent_tick, True),
        ("Peak memory", "memory/peak_bytes", "of the fullest device", size_tick, True),
        ("Learning rate", "train/learning_rate", "learning rate", tick, True),
        ("Gradient norm", "train/grad_norm", "norm before clipping", tick, False),
        ("Loss scale", "train/loss_scale", "factor", tick, False),
    )
    charts = []
    for title, name, label, y_format, from_zero in wanted:
        curve = series(records, name)
        constant_scale = name == "train/loss_scale" and len(set(curve.values)) < 2
        if len(curve) and not constant_scale:
            lines = [Line(title, curve, 0)]
            charts.append(line_chart(title, lines, y_label=label, y_format=y_format, from_zero=from_zero))
    return charts


def phases(records: Sequence[Record]) -> list[Phase]:
    """Where the time of a step goes."""
    seconds = step_seconds(records)
    whole = sum(seconds.values())
    colours = list(PHASE_NAMES)
    return [
        Phase(PHASE_NAMES[name], duration(spent), share(spent / whole), 100 * spent / whole, colours.index(name))
        for name, spent in seconds.items()
        if whole > 0
    ]


def incidents(records: Sequence[Record], events: Sequence[Record]) -> list[tuple[str, str]]:
    """What went wrong or got in the way, also when it is nothing."""
    stalls = [record["seconds/checkpoint_stall"] for record in records if record.get("seconds/checkpoint_stall")]
    resumed = [event["step"] for event in events if event.get("event") == "resumed"]
    waited = f"; training waited {duration(median(stalls))}, at most {duration(max(stalls))}" if stalls else ""
    nonfinite = sorted({name for record in records for name in record.get("nonfinite", [])})
    return [
        ("resumes", f"{len(resumed)}" + (f" (at step {', '.join(map(count, resumed))})" if resumed else "")),
        ("damaged samples skipped", _tally(records, "data/bad_samples")),
        ("steps skipped by the loss scaler", _tally(records, "train/skipped_steps")),
        ("metrics that were NaN or infinite", ", ".join(nonfinite) or "none"),
        ("checkpoints", f"{len(stalls)}{waited}"),
    ]


def _tally(records: Sequence[Record], name: str) -> str:
    value = last_value(records, name)
    return MISSING if value is None else count(value)


def _percent_tick(value: float) -> str:
    return f"{100 * value:.3g} %"
