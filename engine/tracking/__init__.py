"""What a run writes about itself while it goes on.

``metrics.jsonl`` holds one JSON object a line: ``step`` (optimizer steps done) and slash-grouped metrics. ``seconds/*``
are seconds a step, averaged since the record before; ``seconds/checkpoint_stall`` is the wait for one checkpoint and is
there only when one was written. ``eval/*`` comes from held-out text, in records of its own. ``memory/peak_bytes`` is
of the device with the most. A value that is not finite is null and its name stands in ``nonfinite``.

``events.jsonl`` says when the run was started, resumed and closed, and at which step. It is never cut.
"""

from engine.tracking.records import EVENTS, METRICS, read_records
from engine.tracking.tracker import Status, Tracker

__all__ = ["EVENTS", "METRICS", "Status", "Tracker", "read_records"]
