"""The hosts of a run, compared in its first seconds, before any model loads."""

from __future__ import annotations

import logging

import torch

from engine.config.run import RunConfig
from engine.dist import Control
from engine.hosts.compare import Difference, differences, problem_of, shown
from engine.hosts.facts import HostFacts, ask, describe, withdraw

log = logging.getLogger("stillhouse")


def check_hosts(config: RunConfig, control: Control, device: torch.device) -> None:
    """Refuse hosts that would not train together; warn of what only costs speed. Collective.

    Raises ConfigError or DataError, the same on every rank, that says which host differs in what.
    """
    if control.ranks.world_size == 1:
        return
    hosts, found = survey(config, control, device)
    problem = problem_of(found)
    if problem is not None:
        raise problem
    if control.is_main and found:
        log.warning("%s", "\n".join(["the hosts differ:", *shown(found)]))
    if len(hosts) > 1:
        log.info("hosts: %d, alike in versions, source, settings, data and run folder", len(hosts))


def survey(config: RunConfig, control: Control, device: torch.device) -> tuple[list[HostFacts], list[Difference]]:
    """The facts of every host and what they differ in. Collective: one broadcast and one gather of a few kilobytes."""
    question = ask(config) if control.is_main else None
    try:
        question = control.from_main(question)
        assert question is not None
        own = describe(config, question, control.ranks.rank, device) if control.ranks.local_rank == 0 else None
        hosts = [facts for facts in control.gather(own) if facts is not None]
    finally:
        if control.is_main and question is not None:
            withdraw(question)
    return hosts, differences(hosts)
