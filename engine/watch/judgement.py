"""From the beats of all ranks to a sentence that names the one at fault."""

from __future__ import annotations

import os
from statistics import median

from torch.distributed import DistError

from engine.errors import StillhouseError
from engine.meeting import Meeting
from engine.watch.roll import Heard, Sign, Verdict

SLOW_FACTOR = 1.5
"""A rank this many times slower than the median is told of."""
SIGNS_OF_LOSS = ("gloo", "connection closed", "connection reset", "broken pipe", "socket", "nccl")
MAX_NAMED = 8
AGREEMENT = "agreement"
MAY_BE_LONG = ("starting", "evaluation", AGREEMENT)
HANG_SECONDS = 3600.0
"""In a phase that waits for no other rank, while others wait."""
RESUME = "run the same command again: it resumes from the last complete checkpoint"


def is_lost(error: BaseException) -> bool:
    """Whether an exchange between ranks failed, rather than something on this rank. Gloo raises plain RuntimeErrors."""
    if isinstance(error, DistError):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, StillhouseError)
    return is_plain and any(sign in str(error).lower() for sign in SIGNS_OF_LOSS)


def judge(
    meeting: Meeting, heard: Heard, limit_seconds: float, still_seconds: float, trouble_seconds: float
) -> Verdict | None:
    """Why the launch must end; None while all is well.

    A rank that was silent for ``limit_seconds`` is lost. When no rank has begun a new phase for ``still_seconds`` and
    all are at the agreement, they wait for what a cut link does not carry. ``trouble_seconds`` ago some rank first lost
    others.
    """
    for rank, sign in heard.items():
        if sign.beat.left:
            text = f"{meeting.name(rank)} has left after step {sign.beat.step}: {sign.beat.left}"
            return Verdict(text, sign.beat.exit_code)
    silent = [
        f"{meeting.name(rank)} has given no sign of life for {sign.silent_seconds:.0f} s (last heard: {_doing(sign)})"
        for rank, sign in heard.items()
        if sign.silent_seconds > limit_seconds
    ]
    if silent:
        more = f"; and {len(silent) - MAX_NAMED} more" if len(silent) > MAX_NAMED else ""
        return Verdict(f"{'; '.join(silent[:MAX_NAMED])}{more}; {RESUME}")
    stuck = all(sign.beat.phase == AGREEMENT and sign.still_seconds > still_seconds for sign in heard.values())
    if stuck or trouble_seconds > 2.0 * limit_seconds:
        return Verdict(
            "an exchange between ranks failed though all of them live: a link between two hosts is cut, or a rank did "
            f"not come to the exchange. {_where(meeting, heard)}; {RESUME}"
        )
    return hanging(meeting, heard)


def hanging(meeting: Meeting, heard: Heard) -> Verdict | None:
    """A rank that has been at the same for very long, while others wait for it."""
    waiting = [sign for sign in heard.values() if sign.beat.phase == AGREEMENT]
    found = [
        rank
        for rank, sign in heard.items()
        if waiting and sign.beat.phase not in MAY_BE_LONG and sign.still_seconds > HANG_SECONDS
    ]
    if not found:
        return None
    return Verdict(f"{meeting.name(found[0])} hangs. {_where(meeting, heard)}; {RESUME}")


def _doing(sign: Sign) -> str:
    return f"{sign.beat.phase}, after step {sign.beat.step}"


def _where(meeting: Meeting, heard: Heard) -> str:
    """Who is where, the fewest first: the odd one out is it."""
    where: dict[str, list[str]] = {}
    for rank, sign in heard.items():
        where.setdefault(_doing(sign), []).append(meeting.name(rank))
    fewest = sorted(where.items(), key=lambda item: len(item[1]))
    return "; ".join(f"{', '.join(names[:MAX_NAMED])}: {what}" for what, names in fewest[:MAX_NAMED])


def unreachable(meeting: Meeting, seconds: float) -> str:
    """Rank 0 hears all others: who cannot reach it has lost the launch."""
    return (
        f"{meeting.name(meeting.ranks.rank)}: {meeting.name(0)} ({os.environ.get('MASTER_ADDR')}) has not answered for "
        f"{seconds:.0f} s: its host is gone, or this one is cut off; {RESUME}"
    )


def slow_ranks(meeting: Meeting, heard: Heard) -> tuple[float, dict[str, float]]:
    """The median of the ranks' own seconds a step, and those of each rank that takes far longer, slowest first."""
    own = {rank: sign.beat.own_seconds for rank, sign in heard.items() if sign.beat.own_seconds > 0.0}
    if len(own) < 2:
        return 0.0, {}
    middle = median(own.values())
    slow = sorted((rank for rank in own if own[rank] > SLOW_FACTOR * middle), key=lambda rank: -own[rank])
    return middle, {meeting.name(rank): own[rank] for rank in slow}
