"""What a check found, told to people."""

from __future__ import annotations

from collections.abc import Sequence


def conclude(problems: Sequence[str], what: str, checked: str) -> int:
    """Print each problem, then what was checked and how it came out. Returns the exit code: 1 if there was any."""
    for problem in problems:
        print(problem)
    result = "no problem" if not problems else f"{len(problems)} problem" + "s" * (len(problems) > 1)
    print(f"{what}; checked {checked}: {result}")
    return 1 if problems else 0
