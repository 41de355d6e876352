"""What one rank reads for all (a thousand ranks must not each list a folder or open a manifest), and errors of one rank
that all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from engine.errors import StillhouseError, TrainingError

Result = TypeVar("Result")


class Channel(Protocol):
    """What is asked of engine.dist.Control."""

    @property
    def is_main(self) -> bool: ...

    def from_main(self, item: Any) -> Any: ...


class Exchange(Protocol):
    """What is asked of engine.dist.Control."""

    def gather(self, item: Any) -> list[Any]: ...


def raise_together(exchange: Exchange, problem: StillhouseError | None) -> None:
    """Raises, when any rank has a ``problem``, its own on that rank and TrainingError on the others. Collective."""
    texts = exchange.gather(None if problem is None else f"{type(problem).__name__}: {problem}")
    told = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
    if problem is not None:
        raise problem
    if told:
        raise TrainingError("stopped with the others; " + "; ".join(told))


def read_by_main(
    channel: Channel, read: Callable[[], Result], what: str, kind: type[StillhouseError] = StillhouseError
) -> Result:
    """What ``read`` returns on rank 0, everywhere. Collective.

    An error there is everyone's: what is no StillhouseError becomes one of ``kind``, since the others are waiting.
    """
    problem: StillhouseError | None = None
    result: Result | None = None
    if channel.is_main:
        try:
            result = read()
        except StillhouseError as error:
            problem = error
        except Exception as error:  # a full disk, a damaged file: whatever it is
            problem = kind(f"{what}: {type(error).__name__}: {error}")
    problem, result = channel.from_main((problem, result))
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]
