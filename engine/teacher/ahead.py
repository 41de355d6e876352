"""The teacher one micro-batch ahead of the student, on a CUDA stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from engine.schema import Batch, Targets
from engine.teacher.source import TargetSource

Asked = tuple[Batch, Targets | None]
RowsOf = Callable[[Batch], Tensor]


class InTurn:
    """Each micro-batch when the student asks for it: teacher and student never work at the same time."""

    def __init__(self, source: TargetSource, rows_of: RowsOf, device: torch.device) -> None:
        self._source, self._rows_of, self._device = source, rows_of, device

    def over(self, micro_batches: Iterable[Batch]) -> Iterator[Asked]:
        """The micro-batches on the device, each with its targets. Keeps none of them."""
        for micro_batch in micro_batches:
            batch = micro_batch.to(self._device)
            yield batch, self._source.targets_for(batch, self._rows_of(batch))


class OneAhead:
    """Starts the teacher on the next micro-batch of a step before the student takes this one.

    The first micro-batch of a step waits for the teacher as ever: the next step's come only once all ranks agreed to
    go on. So a step of one micro-batch gains nothing. For a teacher that sends no messages: those would have to keep
    their order among the student's.

    What the teacher's stream allocates is used by the student's. Memory given back on the host may be taken again by
    the teacher's stream at once, so before each of its turns that stream waits for all that the student was given
    before the last turn: at most two micro-batches of targets live at a time, and no allocator must be told.
    """

    def __init__(self, source: TargetSource, rows_of: RowsOf, device: torch.device) -> None:
        self._source, self._rows_of, self._device = source, rows_of, device
        self._stream = torch.cuda.Stream(device)

    def over(self, micro_batches: Iterable[Batch]) -> Iterator[Asked]:
        """The micro-batches on the device, each with its targets, in order."""
        student = torch.cuda.current_stream(self._device)
        used = torch.cuda.Event()  # all that was handed out before the last turn has been worked through
        used.record(student)
        coming: list[tuple[Asked, torch.cuda.Event]] = []
        for micro_batch in micro_batches:
            coming.append(self._ask(micro_batch, used))
            if len(coming) == 2:
                yield self._hand_over(coming.pop(0), student)
                used = torch.cuda.Event()
                used.record(student)
        while coming:
            yield self._hand_over(coming.pop(0), student)

    def _ask(self, micro_batch: Batch, used: torch.cuda.Event) -> tuple[Asked, torch.cuda.Event]:
        self._stream.wait_event(used)
        with torch.cuda.stream(self._stream):
            batch = micro_batch.to(self._device)
            asked = batch, self._source.targets_for(batch, self._rows_of(batch))
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return asked, ready

    @staticmethod
    def _hand_over(coming: tuple[Asked, torch.cuda.Event], student: torch.cuda.Stream) -> Asked:
        asked, ready = coming
        student.wait_event(ready)
        return asked
