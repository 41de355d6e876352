"""Hosts side by side: what they differ in, told once for each group of hosts, however many there are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import ConfigError, DataError, StillhouseError
from engine.hosts.facts import SHARED, HostFacts
from engine.meeting import runs_of

ESSENTIAL_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "stillhouse")
"""What the others of ``runfolder.PACKAGES`` differ in is a warning."""
MAX_NAMES = 8


class Rule(NamedTuple):
    refused: bool
    remedy: str


_TRAVEL = "set it on every host; docs/hosts.md says which variables travel with which launcher"
RULES = {
    "failed": Rule(True, "mend that host, or leave it out"),
    "package": Rule(True, "install the same versions on every host: pip install -c constraints.txt -e ."),
    "python": Rule(True, "use the same Python on every host"),
    "source": Rule(True, "bring every host to the same checkout, or run from a shared one"),
    "settings": Rule(True, "give every host the same run YAML and the same overrides"),
    "accelerator": Rule(True, "use hosts with the same accelerator, driver and libraries"),
    "shared": Rule(True, "give a run.output that all hosts mount: one folder, readable and writable on each"),
    "data": Rule(True, "give every host the same files: a shared folder, or a fresh copy on each"),
    "model": Rule(True, "give every host the same files: a shared folder, or a fresh copy on each"),
    "required variable": Rule(True, _TRAVEL),
    "required credential": Rule(True, _TRAVEL),
    "variable": Rule(False, _TRAVEL),
    "credential": Rule(False, _TRAVEL),
    "detail": Rule(False, "ranks of a group go at the pace of the slowest host"),
}
WANTED = {"shared": SHARED, "failed": ""}
"""Values that a host must have even where all are alike."""
DATA_KINDS = {"data", "model", "shared"}


@dataclass(frozen=True)
class Difference:
    kind: str
    text: str
    refused: bool


def differences(hosts: Sequence[HostFacts]) -> list[Difference]:
    """In the order of ``RULES``."""
    names = _names(hosts)
    keys = dict.fromkeys(key for host in hosts for key in host.facts)
    found = []
    for kind, name in sorted(keys, key=lambda key: list(RULES).index(key[0])):
        groups: dict[str, list[str]] = {}
        for host, called in zip(hosts, names):
            if (kind, name) in host.facts:
                groups.setdefault(host.facts[kind, name], []).append(called)
        wanted = WANTED.get(kind)
        if groups.keys() == {wanted} or (len(groups) == 1 and wanted is None):
            continue
        refused = RULES[kind].refused and (kind != "package" or name in ESSENTIAL_PACKAGES)
        found.append(Difference(kind, _line(name, groups, wanted), refused))
    return found


def problem_of(found: Iterable[Difference]) -> StillhouseError | None:
    """What ends the run, if anything does: a DataError where only files differ, else a ConfigError."""
    refused = [difference for difference in found if difference.refused]
    if not refused:
        return None
    kind = DataError if all(difference.kind in DATA_KINDS for difference in refused) else ConfigError
    return kind("\n".join(["the hosts of this run are not alike:", *shown(refused)]))


def shown(found: Iterable[Difference]) -> list[str]:
    """A line a difference, and under those of a kind what to do."""
    lines: list[str] = []
    by_remedy: dict[str, list[str]] = {}
    for difference in found:
        by_remedy.setdefault(RULES[difference.kind].remedy, []).append(difference.text)
    for remedy, texts in by_remedy.items():
        lines += [f"  {text}" for text in texts]
        lines.append(f"    -> {remedy}")
    return lines


def fold(names: Iterable[str]) -> str:
    """Host names as Slurm writes them, node[1-97,99]; of many that do not fold the first few."""
    plain = list(dict.fromkeys(names))
    if len(plain) <= 2:
        return ", ".join(plain)
    found = [re.fullmatch(r"(.*?)(\d+)(\D*)", name) for name in plain]
    padded = {each[1] for each in found if each and len(each[2]) > 1 and each[2].startswith("0")}
    runs: dict[tuple[str, int, str], list[int]] = {}
    for each in filter(None, found):
        width = len(each[2]) if each[1] in padded else 0
        runs.setdefault((each[1], width, each[3]), []).append(int(each[2]))
    others = [name for name, each in zip(plain, found) if each is None]
    parts = [_folded(stem, width, ending, numbers) for (stem, width, ending), numbers in runs.items()] + others
    more = f" and {len(parts) - MAX_NAMES} more" if len(parts) > MAX_NAMES else ""
    return ", ".join(parts[:MAX_NAMES]) + more


def _folded(stem: str, width: int, ending: str, numbers: list[int]) -> str:
    texts = ["-".join(f"{end:0{width}d}" for end in each) for each in runs_of(numbers)]
    if len(numbers) == 1:
        return f"{stem}{texts[0]}{ending}"
    if len(texts) > MAX_NAMES:
        texts = [*texts[:MAX_NAMES], "..."]
    return f"{stem}[{','.join(texts)}]{ending}"


def _line(name: str, groups: dict[str, list[str]], wanted: str | None) -> str:
    """The largest group first, or the one that has what is wanted."""
    ordered = sorted(groups.items(), key=lambda group: (group[0] == wanted, len(group[1])), reverse=True)
    total = sum(map(len, groups.values()))
    told = []
    for value, hosts in ordered:
        whom = f"all {total} hosts" if len(hosts) == total else fold(hosts)
        count = f"{len(hosts)} hosts, " if MAX_NAMES < len(hosts) < total else ""
        told.append(f"{value} on {count}{whom}")
    return f"{name}: {'; '.join(told)}" if not name.endswith(":") else f"settings of {name} {'; '.join(told)}"


def _names(hosts: Sequence[HostFacts]) -> list[str]:
    """Two that bear one name are told apart by their ranks."""
    times = Counter(host.host for host in hosts)
    return [host.host if times[host.host] == 1 else f"{host.host} (rank {host.rank})" for host in hosts]
