"""The models of a run as lines of plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config.measures import measure_name
from engine.report.results import ModelResult, Results

HEADINGS = ("model", "parameters", "perplexity", "agreement", "tokens/s")
NUM_MEASURES = 3
"""As many fit into 80 columns."""


def results_table(results: Results) -> list[str]:
    """One line a model, in the order of ``results``; at most 80 columns wide."""
    if results.measures:
        return _labelled_table(results)
    lines = _aligned([HEADINGS, *(_row(model) for model in results.models)])
    lines.insert(1, "-" * len(lines[0]))
    if results.num_heldout_tokens is not None:
        lines.append(f"on {results.num_heldout_tokens:,} held-out positions; agreement: the teacher's first choice")
    return lines


def _labelled_table(results: Results) -> list[str]:
    measures = results.measures[:NUM_MEASURES]
    rows: list[Sequence[str]] = [("model", "parameters", *map(measure_name, measures), "agreement", "ms")]
    for model in results.models:
        scores = model.scores.measures if model.scores else {}
        rows.append(
            (
                model.name,
                f"{model.num_parameters:,}",
                *(f"{100 * scores[name]:.2f}" if name in scores else "-" for name in measures),
                "-" if model.agreement is None else f"{model.agreement:.1%}",
                "-" if model.latency_seconds is None else f"{1000 * model.latency_seconds:.1f}",
            )
        )
    lines = _aligned(rows)
    lines.insert(1, "-" * len(lines[0]))
    if results.retained is not None:
        lines.append(f"the student keeps {results.retained:.1%} of the teacher's {measure_name(measures[0])}")
    return lines


def _row(model: ModelResult) -> tuple[str, ...]:
    return (
        model.name,
        f"{model.num_parameters:,}",
        "-" if model.perplexity is None else f"{model.perplexity:,.2f}",
        "-" if model.agreement is None else f"{model.agreement:.1%}",
        "-" if model.tokens_per_second is None else f"{model.tokens_per_second:,.0f}",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
