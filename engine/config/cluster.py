"""What the ranks of several hosts expect of each other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from engine.config.section import Section


class ClusterSection(Section):
    """How a run of several ranks finds out that one of them is gone."""

    timeout_seconds: Annotated[float, Field(ge=5.0)] = 120.0
    """A rank that gives no sign of life for this long (a lost host, a cut cable, a stopped process) ends the run, and
    is named. Also the time limit of an exchange of gradients or weights."""
