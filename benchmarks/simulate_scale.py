"""A run on 8 to 4,096 ranks on paper, and the real order and planning code for the largest of them.

    python benchmarks/simulate_scale.py --step-seconds 1.9 --output benchmarks/results/simulate_scale.json

Times come from a step measured on one device (``--step-seconds``; without it from FLOPs, see ``--mfu``) and from
bandwidths; the formulas are in ``scale_model.py``. The defaults are of data sheets, not measured here: eight H100 a
node, 450 GB/s each way inside it (NVLink 4), 400 Gb/s between nodes (one NDR InfiniBand port a node; a DGX H100 has
eight), a store of 100 GB/s that gives a node 5 GB/s. A sequence of 4,096 tokens is 2 bytes a token and 2,048 of tar
headers.

Then the real code: the manifest of 100,000 shards is parsed, the run is resolved for every number of ranks, and the
data order is asked for the first step of all ranks, for places all over three epochs, and for a step in mid-epoch as a
rank that resumes there finds it. Needed: 5 s and 500 MB for all of it, the imports not counted in the seconds.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from measuring import peak_process_bytes, print_table, write_json
from scale_model import (
    Cluster,
    Work,
    bytes_of_step,
    checkpoint_bytes,
    checkpoint_files,
    exposed_seconds,
    growths,
    opened,
    opens_of_epoch,
    resume_seconds,
    start_seconds,
    step_seconds,
    write_seconds,
)

from engine.config.load import parse_config
from engine.config.resolve import Accelerator, resolve
from engine.data.manifest import Manifest
from engine.data.order import DataOrder, Location
from engine.data.shards import ShardSet

NEEDED_SECONDS, NEEDED_BYTES = 5.0, 500 * 10**6
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LANES, LOCAL_SEQUENCES, MICRO_SEQUENCES, SHUFFLE_SAMPLES, EPOCHS = 4096, 8, 2, 1024, 3
SEQUENCE_TOKENS, SAMPLES_PER_SHARD, HEADER_BYTES = 4096, 2000, 2048
PREFETCHED_STEPS = 3


def main() -> None:
    arguments = parse_arguments()
    work, cluster = work_of(arguments), cluster_of(arguments)
    real = real_code(max(RANKS), arguments.shards)
    rows, figures = [], []
    for ranks in RANKS:
        figures.append(figures_of(ranks, work, cluster, arguments.shards, real))
        rows.append(row_of(figures[-1]))
    print(f"ZeRO-{work.zero_stage}, {work.parameters:.3g} parameters, {work.step_seconds:.2f} s of compute a step")
    print("opens: files opened, made or removed by all ranks: at the start, for a checkpoint, a second")
    header = ("ranks", "step s", "msgs s", "node MB/s", "store MB/s", "save s", "start s", "resume s")
    print_table((*header, "opens", "a save", "a second"), rows)
    print(
        f"real code for {max(RANKS):,} ranks and {arguments.shards:,} shards: {real['seconds']:.2f} s of one core, "
        f"process {real['peak_bytes'] / 1e6:,.0f} MB at its peak "
        f"(needed {NEEDED_SECONDS:.0f} s, {NEEDED_BYTES / 1e6:.0f} MB)"
    )
    for name, growth in growths(work, cluster, max(RANKS)).items():
        print(f"  {name}: {growth}")
    settings = {"work": asdict(work), "cluster": asdict(cluster)}
    write_json(arguments.output, settings | {"real_code": real, "ranks": figures})
    if real["seconds"] > NEEDED_SECONDS or real["peak_bytes"] > NEEDED_BYTES:
        raise SystemExit("more than is allowed")


def figures_of(ranks: int, work: Work, cluster: Cluster, num_shards: int, real: dict[str, Any]) -> dict[str, Any]:
    step = step_seconds(work, cluster, ranks)
    nodes = -(-ranks // cluster.ranks_per_node)
    read = bytes_of_step(work, ranks) / step
    epoch_steps = num_shards * SAMPLES_PER_SHARD / (ranks * work.local_sequences)
    opens = opened(ranks, work.zero_stage, round(real["first_step_opens"] * ranks / max(RANKS)))
    manifest = real["manifest_seconds"]
    return {
        "ranks": ranks,
        "step_seconds": step,
        "exposed_seconds": exposed_seconds(work, cluster, ranks),
        "read_bytes_per_second_per_node": read / nodes,
        "read_bytes_per_second": read,
        "checkpoint_bytes": checkpoint_bytes(work.parameters, work.zero_stage),
        "checkpoint_files": checkpoint_files(ranks, work.zero_stage),
        "write_seconds": write_seconds(work, cluster, ranks),
        "start_seconds": start_seconds(work, cluster, ranks, manifest),
        "resume_seconds": resume_seconds(work, cluster, ranks, manifest),
        "opens_at_start": opens.start,
        "opens_at_resume": opens.resume,
        "opens_of_checkpoint": opens.checkpoint,
        "opens_per_second": opens_of_epoch(num_shards, LANES) / (epoch_steps * step),
    }


def row_of(figures: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{figures['ranks']:,}",
        f"{figures['step_seconds']:.2f}",
        f"{figures['exposed_seconds']:.2f}",
        f"{figures['read_bytes_per_second_per_node'] / 1e6:.2f}",
        f"{figures['read_bytes_per_second'] / 1e6:.1f}",
        f"{figures['write_seconds']:.1f}",
        f"{figures['start_seconds']:.0f}",
        f"{figures['resume_seconds']:.0f}",
        f"{figures['opens_at_start']:,}",
        f"{figures['opens_of_checkpoint']:,}",
        f"{figures['opens_per_second']:.1f}",
    )


def real_code(num_ranks: int, num_shards: int) -> dict[str, Any]:
    """Seconds of the processor for each part and for all, and the peak of this process: other work on the machine does
    not count. Asserts what the order promises."""
    content = manifest_content(num_shards)
    begin = time.process_time()
    shards = ShardSet.unpack("/data/manifest.json", content)
    manifest = shards.manifest
    manifest_seconds = time.process_time() - begin
    for ranks in RANKS:
        run = resolve_for(ranks, manifest)
        assert run.batch.local_sequences == LOCAL_SEQUENCES
    resolved = time.process_time()
    first_step_opens, places = all_first_steps(manifest, num_ranks)
    walk_epochs(manifest)
    resume_in_mid_epoch(manifest, num_ranks)
    seconds = time.process_time() - begin
    return {
        "num_ranks": num_ranks,
        "num_shards": num_shards,
        "manifest_packed_bytes": len(content),
        "manifest_seconds": manifest_seconds,
        "resolve_seconds": resolved - begin - manifest_seconds,
        "order_seconds": seconds + begin - resolved,
        "seconds": seconds,
        "peak_bytes": peak_process_bytes(),
        "first_step_opens": first_step_opens,
        "first_step_places": places,
        "order_bytes_of_a_rank": order_bytes(manifest, num_ranks),
    }


def manifest_content(num_shards: int) -> bytes:
    """As ``ShardSet.pack`` gives it, of shards that do not exist."""
    rng = np.random.default_rng(0)
    entries = [
        {
            "name": f"shard-{number:06d}.tar",
            "num_samples": SAMPLES_PER_SHARD,
            "num_tokens": SAMPLES_PER_SHARD * SEQUENCE_TOKENS,
            "num_bytes": SAMPLES_PER_SHARD * (2 * SEQUENCE_TOKENS + HEADER_BYTES),
            "sha256": rng.bytes(32).hex(),
            "index": f"shard-{number:06d}.index.npy",
            "index_sha256": rng.bytes(32).hex(),
        }
        for number in range(num_shards)
    ]
    whole = Manifest("causal_lm", "f", 50_000, 0, SEQUENCE_TOKENS, num_shards, (), "", "simulated")
    return zlib.compress(json.dumps(asdict(whole) | {"shards": entries}).encode(), level=1)


def resolve_for(ranks: int, manifest: Manifest) -> Any:
    config = {
        "run": {"name": "simulated", "num_epochs": EPOCHS, "precision": "bf16"},
        "task": {"kind": "causal_lm"},
        "student": {"config": {"model_type": "llama"}},
        "data": {"manifest": "/data/manifest.json", "lanes": LANES, "shuffle_samples": SHUFFLE_SAMPLES},
        "batch": {"global_sequences": LOCAL_SEQUENCES * ranks, "micro_sequences": MICRO_SEQUENCES},
        "losses": [{"kind": "cross_entropy", "weight": 1.0}],
    }
    parsed = parse_config(config)
    facts = manifest.facts
    assert isinstance(parsed.zero, dict)
    return resolve(
        parsed,
        world_size=ranks,
        accelerator=Accelerator("cuda", ("bf16",)),
        data=facts,
        deepspeed_json=parsed.zero,
        deepspeed_name="zero",
    )


def order_of(manifest: Manifest) -> DataOrder:
    return DataOrder(manifest.samples_per_shard, seed=0, lanes=LANES, shuffle_samples=SHUFFLE_SAMPLES)


def step_of_rank(order: DataOrder, step: int, rank: int, num_ranks: int) -> list[Location]:
    """As engine.data.loader.Loader cuts a step."""
    first = step * LOCAL_SEQUENCES * num_ranks
    return [order.locate(c) for c in range(first + rank, first + LOCAL_SEQUENCES * num_ranks, num_ranks)]


def all_first_steps(manifest: Manifest, num_ranks: int) -> tuple[int, int]:
    """Pairs of rank and shard, and samples, of the first step; no sample is met twice."""
    order = order_of(manifest)
    places = [step_of_rank(order, 0, rank, num_ranks) for rank in range(num_ranks)]
    met = {location for mine in places for location in mine}
    assert len(met) == LOCAL_SEQUENCES * num_ranks
    return sum(len({location.shard for location in mine}) for mine in places), len(met)


def walk_epochs(manifest: Manifest) -> None:
    """Lanes all over three epochs: the places of an epoch lie in as many shards, and differ from the last epoch's."""
    order = order_of(manifest)
    for epoch in range(EPOCHS):
        first = epoch * order.sequences_per_epoch
        places = [order.locate(first + lane) for lane in range(0, LANES, 16)]
        assert len({(place.shard, place.index) for place in places}) == len(places)
        assert {place.epoch for place in places} == {epoch}


def resume_in_mid_epoch(manifest: Manifest, num_ranks: int) -> None:
    """A rank that starts at a late step is where one that walked there is."""
    steps = range(SHUFFLE_SAMPLES // LOCAL_SEQUENCES * 3 - 1, SHUFFLE_SAMPLES // LOCAL_SEQUENCES * 3 + PREFETCHED_STEPS)
    for rank in (0, num_ranks // 2, num_ranks - 1):
        walked, resumed = order_of(manifest), order_of(manifest)
        for step in range(0, steps.start, 16):
            step_of_rank(walked, step, rank, num_ranks)
        for step in steps:
            assert step_of_rank(walked, step, rank, num_ranks) == step_of_rank(resumed, step, rank, num_ranks)


def order_bytes(manifest: Manifest, num_ranks: int) -> int:
    """What one rank's order keeps after some windows: shards' counts, two epochs' lines, a window a lane of its own."""
    order = order_of(manifest)
    for step in range(0, 4 * SHUFFLE_SAMPLES // LOCAL_SEQUENCES, 16):
        step_of_rank(order, step, 0, num_ranks)
    lines = sum(array.nbytes for pair in order._lines.values() for array in pair)
    return order._counts.nbytes + lines + sum(window.nbytes for _, window in order._windows.values())


def work_of(arguments: argparse.Namespace) -> Work:
    tokens = LOCAL_SEQUENCES * SEQUENCE_TOKENS
    flops = tokens * (6 * arguments.parameters + 2 * arguments.teacher_parameters)
    return Work(
        parameters=arguments.parameters,
        teacher_parameters=arguments.teacher_parameters,
        step_seconds=arguments.step_seconds or flops / (arguments.peak_flops * arguments.mfu),
        local_sequences=LOCAL_SEQUENCES,
        accumulation=LOCAL_SEQUENCES // MICRO_SEQUENCES,
        record_bytes=2 * SEQUENCE_TOKENS + HEADER_BYTES,
        zero_stage=arguments.zero_stage,
        checkpoint_every_steps=500,
    )


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    return Cluster(
        ranks_per_node=arguments.ranks_per_node,
        node_network=arguments.node_gigabits * 1e9 / 8,
        inside_node=arguments.inside_gigabytes * 1e9,
        store=arguments.store_gigabytes * 1e9,
        node_store=arguments.node_store_gigabytes * 1e9,
        hop_seconds=arguments.hop_microseconds / 1e6,
        overlap=arguments.overlap,
        import_seconds=arguments.import_seconds,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    more: dict[str, tuple[float, str]] = {
        "step-seconds": (0.0, "compute of a step of 8 sequences of 4,096 tokens on one device; 0: from FLOPs"),
        "parameters": (1.0e9, "of the student"),
        "teacher-parameters": (1.7e9, "of the teacher, on every device"),
        "peak-flops": (989e12, "of the device (H100 SXM data sheet, bf16 without sparsity)"),
        "mfu": (0.4, "share of it that a step reaches: an assumption"),
        "node-gigabits": (400.0, "network of a node, each way (one NDR InfiniBand port)"),
        "inside-gigabytes": (450.0, "between devices of a node, each way (NVLink 4 data sheet)"),
        "store-gigabytes": (100.0, "of the whole store: an assumption"),
        "node-store-gigabytes": (5.0, "of the store to one node: an assumption"),
        "hop-microseconds": (25.0, "a small TCP message between nodes: an assumption"),
        "overlap": (0.6, "share of the compute that hides messages: the backward pass is two thirds"),
        "import-seconds": (20.0, "imports and rendezvous: an assumption"),
    }
    for name, (default, text) in more.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{text} (default {default:g})")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
