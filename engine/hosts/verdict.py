"""What a cluster was found to be, in 80 columns: a summary, the hosts that stand out, and whether a run may start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from engine.hosts.compare import Difference, fold, shown
from engine.hosts.facts import HostFacts
from engine.hosts.measure import AllReduce, Speed

CLOCK_WARNING_SECONDS, CLOCK_ERROR_SECONDS = 1.0, 30.0
"""From the first on, logs of several hosts cannot be put in order. The second is half the age at which a claim on a
shard counts as abandoned; S3 refuses signatures that are 15 minutes off, and tokens and certificates less."""
SLOW_RATIO, SLOW_LINK_RATIO = 0.8, 0.5
"""Of the median. Hosts of one kind differ by some per cent."""
FREE_SHARE = 0.9
"""Of a GPU's memory; more in use belongs to somebody else."""
SHM_BYTES = {"cpu": 66 << 20, "cuda": 64 << 20}
"""A rank: DeepSpeed's all-reduce buffers on a CPU, NCCL's between the GPUs of a host."""
MAX_ROWS, NUM_COLUMNS = 12, 80
SOURCE = "the engine's source"


@dataclass(frozen=True)
class Need:
    """What the run's plan asks of the hosts."""

    device_bytes: int
    checkpoint_bytes: int
    """of those that are kept and the one being written, less what is there already"""
    num_checkpoints: int


@dataclass(frozen=True)
class Cluster:
    """Everything that was found out."""

    kind: str
    output: str
    hosts: Sequence[HostFacts]
    found: Sequence[Difference]
    speeds: Sequence[Speed]
    """of every rank"""
    all_reduces: Sequence[AllReduce]
    need: Need | None
    """None when the run could not be planned"""
    plan_problem: str | None = None


class Row(NamedTuple):
    """A host by its slowest rank; ratios are to the median host."""

    host: str
    num_ranks: int
    matmul_flops: float
    copy_bytes: float
    ratio: float
    link_bytes: float
    link_ratio: float
    clock_seconds: float
    free_bytes: int | None
    shm_bytes: int


def judge(cluster: Cluster) -> tuple[list[str], bool]:
    """All lines, and whether the run may start."""
    rows = _rows(cluster.speeds)
    problems, warnings = _judgements(cluster, rows)
    lines = [*_summary(cluster, rows), "", *_table(rows), ""]
    if warnings:
        lines += ["Warnings", *warnings, ""]
    if problems:
        count = sum(not line.startswith("    ") for line in problems)
        return [*lines, f"Verdict     NO, {count} to mend:", *problems], False
    return [*lines, "Verdict     YES, the hosts are ready for this run"], True


def _rows(speeds: Sequence[Speed]) -> list[Row]:
    by_host: dict[str, list[Speed]] = {}
    for speed in speeds:
        by_host.setdefault(speed.host, []).append(speed)
    slowest = {
        host: (min(each.matmul_flops for each in ranks), min(each.copy_bytes for each in ranks))
        for host, ranks in by_host.items()
    }
    middle = [median(numbers) for numbers in zip(*slowest.values())]
    links = {host: max(each.link_bytes for each in ranks) for host, ranks in by_host.items()}
    middle_link = median([link for link in links.values() if link] or [1.0])
    rows = []
    for host, ranks in by_host.items():
        free = [each.free_bytes for each in ranks if each.free_bytes is not None]
        rows.append(
            Row(
                host,
                len(ranks),
                *slowest[host],
                min(own / each for own, each in zip(slowest[host], middle)),
                links[host],
                links[host] / middle_link if links[host] else 1.0,
                max((each.clock_seconds for each in ranks), key=abs),
                min(free) if free else None,
                min(each.shm_bytes for each in ranks),
            )
        )
    return rows


def _judgements(cluster: Cluster, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    problems = shown(difference for difference in cluster.found if difference.refused)
    warnings = shown(difference for difference in cluster.found if not difference.refused)
    if cluster.plan_problem is not None:
        problems += [f"  {cluster.plan_problem}"]
    for row in rows:
        offset = abs(row.clock_seconds)
        if offset > CLOCK_WARNING_SECONDS:
            text = f"  {row.host}: its clock is {row.clock_seconds:+.1f} s off rank 0's; start chrony or ntpd there"
            (problems if offset > CLOCK_ERROR_SECONDS else warnings).append(text)
        if row.ratio < SLOW_RATIO:
            warnings.append(f"  {row.host}: computes or copies at {row.ratio:.2f} of the median host's speed")
        if row.link_ratio < SLOW_LINK_RATIO:
            warnings.append(f"  {row.host}: its link has {row.link_ratio:.2f} of the median's bandwidth")
        if row.shm_bytes < SHM_BYTES[cluster.kind] * row.num_ranks:
            needed = _size(SHM_BYTES[cluster.kind] * row.num_ranks)
            warnings.append(f"  {row.host}: /dev/shm has {_size(row.shm_bytes)} free, {needed} are used")
            warnings.append("    -> in a container give --shm-size or --ipc=host")
    used = {speed.host for speed in cluster.speeds if (speed.free_bytes or 1) < FREE_SHARE * (speed.total_bytes or 1)}
    if used:
        warnings.append(f"  {fold(used)}: GPU memory is in use by another program")
    if cluster.need is not None:
        problems += _shortages(cluster, cluster.need, rows)
    return problems, warnings


def _shortages(cluster: Cluster, need: Need, rows: Sequence[Row]) -> list[str]:
    found = []
    short = [row for row in rows if row.free_bytes is not None and row.free_bytes < need.device_bytes]
    if short:
        free = min(row.free_bytes or 0 for row in short)
        found.append(
            f"  {fold(row.host for row in short)}: {_size(free)} of GPU memory free, the run needs "
            f"{_size(need.device_bytes)}"
        )
        found.append("    -> preflight without --cluster, with --device-memory, says what would help")
    disk = min(speed.disk_bytes for speed in cluster.speeds)
    if disk < need.checkpoint_bytes:
        text = f"{_size(disk)} free, {need.num_checkpoints} checkpoints need {_size(need.checkpoint_bytes)}"
        found += [f"  {cluster.output}: {text}", "    -> free some space, or give another run.output"]
    return found


def _summary(cluster: Cluster, rows: Sequence[Row]) -> list[str]:
    facts, num_hosts = cluster.hosts[0].facts, len(rows)
    versions = ", ".join(f"{name} {facts['package', name]}" for name in ("torch", "deepspeed", "transformers"))
    differ = {difference.kind for difference in cluster.found}
    slowest = min(rows, key=lambda row: row.ratio)
    clocks = max((row.clock_seconds for row in rows), key=abs)
    backend = "NCCL" if cluster.kind == "cuda" else "gloo"
    unit = "TFLOP/s" if cluster.kind == "cuda" else "GFLOP/s"
    flops = median(row.matmul_flops for row in rows) / (1e12 if cluster.kind == "cuda" else 1e9)
    lines = [
        f"Cluster     {_plural(num_hosts, 'host')}, {_plural(len(cluster.speeds), 'rank')}, "
        f"{cluster.kind} over {backend}: {fold(row.host for row in rows)}",
        f"Versions    {_alike({'package', 'python', 'accelerator'} & differ)}: {versions}",
        f"Source      {_alike({'source'} & differ)}: {facts['source', SOURCE]}",
        f"Settings    {_alike({kind for kind in differ if kind == 'settings' or 'required' in kind})}: "
        "the run YAML, and variables that must agree",
        f"Data        {_alike({'data', 'model'} & differ)}: manifests, shards, model folders",
        f"Folder      {'NOT SHARED' if 'shared' in differ else 'shared'}, "
        f"{_size(min(speed.disk_bytes for speed in cluster.speeds))} free: {cluster.output}",
    ]
    if cluster.need is not None:
        kept = f"{_size(cluster.need.checkpoint_bytes)} for {cluster.need.num_checkpoints} checkpoints"
        lines.append(f"Planned     {kept}, {_size(cluster.need.device_bytes)} a device")
    lines.append(f"Clocks      at most {_time(abs(clocks))} off rank 0's")
    lines += [
        f"{'All-reduce' if not number else '':<12}{_size(each.num_bytes)} in {_time(each.seconds)}, "
        f"bus bandwidth {each.bus_bytes / 1e9:.2f} GB/s"
        for number, each in enumerate(cluster.all_reduces)
    ]
    copied = median(row.copy_bytes for row in rows) / 1e9
    lines.append(f"Speed       matmul {flops:.3g} {unit}, copy {copied:,.0f} GB/s: the median host")
    lines.append(f"Slowest     {slowest.host}, {slowest.ratio:.2f} of the median")
    return [line if len(line) <= NUM_COLUMNS else line[: NUM_COLUMNS - 3] + "..." for line in lines]


def _table(rows: Sequence[Row]) -> list[str]:
    """All hosts, or those that stand out."""
    chosen = list(rows)
    if len(rows) > MAX_ROWS:
        chosen = sorted(rows, key=_strangeness, reverse=True)[:MAX_ROWS]
    lines = [f"{'Host':<22}{'ranks':>6}{'speed':>8}{'link':>11}{'clock':>10}{'GPU free':>11}{'shm free':>12}"]
    for row in chosen:
        link = f"{row.link_bytes / 1e9:.2f} GB/s" if row.link_bytes else "-"
        free = _size(row.free_bytes) if row.free_bytes is not None else "-"
        lines.append(
            f"{row.host[:22]:<22}{row.num_ranks:>6}{row.ratio:>8.2f}{link:>11}"
            f"{_time(row.clock_seconds):>10}{free:>11}{_size(row.shm_bytes):>12}"
        )
    if len(chosen) < len(rows):
        lines.append(f"... and {len(rows) - len(chosen)} hosts nearer to the median")
    return lines


def _strangeness(row: Row) -> float:
    return max(1 / max(row.ratio, 1e-3), 1 / max(row.link_ratio, 1e-3), abs(row.clock_seconds))


def _alike(differ: set[str]) -> str:
    return "DIFFER" if differ else "alike"


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' if number != 1 else ''}"


def _size(num_bytes: float) -> str:
    """Bytes in powers of ten."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.2f} ms"
