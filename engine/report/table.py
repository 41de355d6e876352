"""The models of a run as lines of plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from engine.report.results import ModelResult, Results

HEADINGS = ("model", "parameters", "perplexity", "agreement", "tokens/s")


def results_table(results: Results) -> list[str]:
    """One line a model, in the order of ``results``; at most 80 columns wide."""
    lines = _aligned([HEADINGS, *(_row(model) for model in results.models)])
    lines.insert(1, "-" * len(lines[0]))
    if results.num_heldout_tokens is not None:
        lines.append(f"on {results.num_heldout_tokens:,} held-out positions; agreement: the teacher's first choice")
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
