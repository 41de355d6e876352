"""Preflight on the cluster itself: its hosts started, compared and measured. The ``--cluster`` of preflight."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError, LostRankError, StillhouseError
from engine.hosts.allocation import hosts_of_ranks, launch_words

if TYPE_CHECKING:
    import torch

    from engine.config.run import RunConfig
    from engine.hosts.verdict import Need
    from engine.meeting import Meeting

COLLECTIVE_SECONDS = 60.0


def check_cluster(arguments: argparse.Namespace, script: str) -> int:
    """Start a rank on each host, unless a launcher did; then compare and measure. The exit code: 0 ready, 1 not."""
    words = launch_words(os.environ, [script, *sys.argv[1:]], arguments.hostfile, arguments.world_size)
    if words is None:
        return _meet_and_examine(arguments)
    print(f"starting    {' '.join(words[:6])} ...", flush=True)
    try:
        return subprocess.run(words).returncode
    except OSError as problem:
        raise ConfigError(f"{words[0]} cannot be started: {problem}") from problem


def _meet_and_examine(arguments: argparse.Namespace) -> int:
    from engine.config.load import load_stages
    from engine.dist import leave_group
    from engine.log import setup
    from engine.meeting import meet
    from engine.rendezvous import read_ranks
    from engine.watch import Watch

    config = load_stages(arguments.config, arguments.overrides)[0]
    ranks = read_ranks()
    setup(ranks.rank)
    try:
        meeting = meet(ranks, arguments.join_seconds, hosts_of_ranks(os.environ, arguments.hostfile))
    except LostRankError as problem:
        print(f"Verdict     NO: {problem}", file=sys.stdout if ranks.rank == 0 else sys.stderr)
        return 1
    with Watch(meeting, COLLECTIVE_SECONDS) as watch:
        code = _examine(arguments, config, meeting)
        watch.close()
    leave_group(ranks)
    return code


def _examine(arguments: argparse.Namespace, config: RunConfig, meeting: Meeting) -> int:
    """The exit code, the same on every rank. Collective."""
    import torch.distributed as dist

    from engine.dist import Control
    from engine.hosts.check import survey
    from engine.hosts.measure import measure_all_reduce, measure_links, measure_rank
    from engine.hosts.verdict import Cluster, judge

    ranks = meeting.ranks
    device = _join_group(meeting)
    control = Control(ranks)
    hosts, found = survey(config, control, device)
    host = meeting.host_of[ranks.rank]
    # one program at a time would be fairer to hosts that share a disk or a switch, and too slow for a thousand
    own = measure_rank(host, ranks.rank, device, Path(config.run.output))
    control.barrier()
    own = measure_links(own, [each.rank for each in hosts], dist.new_group(backend="gloo"))
    all_reduces = measure_all_reduce(device)
    speeds = control.gather(own)
    code = 0
    if control.is_main:
        need, problem_of_plan = _plan(arguments, config, device, ranks.world_size)
        cluster = Cluster(device.type, config.run.output, hosts, found, speeds, all_reduces, need, problem_of_plan)
        lines, is_ready = judge(cluster)
        print("\n".join(lines), flush=True)
        code = 0 if is_ready else 1
    return int(control.from_main(code))


def _join_group(meeting: Meeting) -> torch.device:
    """As a run joins it, without DeepSpeed. Raises ConfigError when some hosts have a GPU that works and others none:
    their ranks would wait for each other in two kinds of group."""
    import torch
    import torch.distributed as dist

    ranks, store = meeting.ranks, meeting.store
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    store.set(f"accelerator/{ranks.rank}", device.type)
    if ranks.rank == 0:
        kinds = [store.get(f"accelerator/{rank}").decode() for rank in range(ranks.world_size)]
        store.set("accelerators", _mixture(kinds, meeting.host_of))
    if mixture := store.get("accelerators").decode():
        raise ConfigError(mixture)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        device_id=device if device.type == "cuda" else None,
    )
    return device


def _mixture(kinds: list[str], hosts: tuple[str, ...]) -> str:
    from engine.hosts.compare import fold

    without = [host for host, kind in zip(hosts, kinds) if kind != "cuda"]
    if not without or len(without) == len(kinds):
        return ""
    return (
        f"no GPU that torch can use on {fold(without)}, while the other hosts have one; look at nvidia-smi, the driver "
        "and CUDA_VISIBLE_DEVICES there"
    )


def _plan(
    arguments: argparse.Namespace, config: RunConfig, device: torch.device, num_ranks: int
) -> tuple[Need | None, str | None]:
    """What the run needs of a device and of the disk, and what is wrong with its plan."""
    import torch

    from engine.hosts.verdict import Need
    from engine.planning import Machine, Planner

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    machine = Machine(device.type, arguments.world_size or num_ranks, None, name, arguments.mfu)
    try:
        plan = Planner(
            arguments.config, arguments.overrides, machine, arguments.samples, arguments.sequence_tokens
        ).plan()
    except StillhouseError as problem:
        return None, str(problem)
    folder = Path(config.run.output) / config.run.name / "checkpoints"
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    num_checkpoints = config.checkpoint.keep + 1
    return Need(plan.device_bytes, max(0, num_checkpoints * plan.checkpoint_bytes - held), num_checkpoints), None
