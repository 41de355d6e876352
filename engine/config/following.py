"""How a run is followed: what is scored, when it ends early, what is saved and where it is told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.config.section import Count, Section


class EvaluationSection(Section):
    """Held-out text, scored during and after the run."""

    manifest: str | None = None
    """manifest.json of the held-out shards. None: no evaluation."""
    every_steps: Count | None = None
    """Evaluate this often as well as at the end."""
    test_manifest: str | None = None
    """manifest.json of shards that are scored once, at the end, in the place of `manifest`: so that what early_stop
    or a schedule looked at is not what the student is judged by."""
    max_sequences: Count | None = None
    """Sequences to score at most. Default: 1024 of text, all of data with labels of their own."""
    teacher: str | None = None
    """Model to score as the teacher of a run that asks none. Default: in stages, the file's teacher.model."""
    control: str | None = None
    """Exported folder of the student's twin that was trained without a teacher: scored and shown beside it."""


class EarlyStopSection(Section):
    """An end of the run before its last step, when held-out data no longer get better; the best student is kept."""

    measure: str | None = None
    """What is judged at each evaluation: `loss`, or a measure of the task, such as `f1` or `accuracy`. Default: the one
    that the task is judged by."""
    patience: Count = 3
    """Evaluations without a better value before the run ends."""


class CheckpointSection(Section):
    """When to save and what to keep."""

    every_steps: Count = 500
    """Steps between checkpoints; the last step always has one."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Complete checkpoints kept. Never fewer than two: the newest may be the one that a fault hit."""


class TrackingSection(Section):
    """What is written while the run goes on. metrics.jsonl is always written."""

    every_steps: Count = 10
    """Steps between records."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases. The run keeps its id over a resume; an outage never stops training."""
    wandb_project: str = "stillhouse"
    """Project of the wandb run."""
    wandb_entity: str | None = None
    """Team of the wandb run."""
    wandb_group: str | None = None
    """Group of the wandb run. Default: none, or for the stages of a run its name."""
    tensorboard: bool = False
    """Event files below the run folder."""
