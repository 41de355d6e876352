"""Formulas of ``simulate_scale.py``: what a step, a start and a checkpoint cost on N ranks, and who opens what.

Bytes are exact where the code decides them (tests hold them against real runs); times divide them by bandwidths.
"""

from __future__ import annotations

from dataclasses import dataclass

VALUE_BYTES = 2
"""Weights and gradients travel and are kept in bf16."""
OPTIMIZER_BYTES = 12
"""fp32 master weight and two moments a parameter."""
FILES_OF_RANK_STATE = 1
FILES_OF_CHECKPOINT = 2
"""meta.json and COMPLETE"""
OPENS_OF_SHARD = 2
"""the shard and its index; a remote shard is also asked for its size"""


@dataclass(frozen=True)
class Work:
    """A run. ``step_seconds`` is the compute of one step on one device: all its micro-batches, teacher and student."""

    parameters: float
    teacher_parameters: float
    step_seconds: float
    local_sequences: int
    accumulation: int
    record_bytes: int
    """of one sequence in a shard, with its headers"""
    zero_stage: int
    checkpoint_every_steps: int


@dataclass(frozen=True)
class Cluster:
    """Bandwidths in bytes a second."""

    ranks_per_node: int
    node_network: float
    inside_node: float
    store: float
    """of the whole store"""
    node_store: float
    """of one node to the store"""
    hop_seconds: float
    """of one message between two nodes"""
    overlap: float
    """share of the compute under which DeepSpeed can hide messages"""
    import_seconds: float


@dataclass(frozen=True)
class Messages:
    """Bytes that one rank sends (and receives) in a step."""

    hidden: float
    """that overlap with the backward pass, and under stage 3 with the forward pass"""
    exposed: float
    """the gather of new weights after the step, under stage 2"""

    @property
    def total(self) -> float:
        return self.hidden + self.exposed


def messages(work: Work, num_ranks: int) -> Messages:
    """Rajbhandari and others, ZeRO, arXiv 1910.02054, section 7: stages 1 and 2 reduce-scatter the gradients and gather
    the weights, 2 P; stage 3 gathers the weights twice as well, 3 P. A ring leaves out 1 / N of it. DeepSpeed reduces
    under stage 2, and does all of it under stage 3, for every micro-batch.
    """
    share = (num_ranks - 1) / num_ranks
    whole = work.parameters * VALUE_BYTES * share
    if work.zero_stage == 3:
        return Messages(3 * whole * work.accumulation, 0.0)
    return Messages(whole * (work.accumulation if work.zero_stage == 2 else 1), whole)


def bandwidth(cluster: Cluster, num_ranks: int) -> float:
    """Of the narrowest link of a ring: rings leave a node once, so that its ranks share its network."""
    return cluster.inside_node if num_ranks <= cluster.ranks_per_node else cluster.node_network


def exposed_seconds(work: Work, cluster: Cluster, num_ranks: int) -> float:
    """Communication that compute does not hide."""
    sent, rate = messages(work, num_ranks), bandwidth(cluster, num_ranks)
    hidden = min(sent.hidden / rate, cluster.overlap * work.step_seconds)
    return sent.total / rate - hidden


def agreement_seconds(cluster: Cluster, num_ranks: int) -> float:
    """The small all-reduce of a step over gloo, whose ring takes 2 (N - 1) messages one after another."""
    inside = cluster.hop_seconds / 5  # between two processes of a node
    nodes = -(-num_ranks // cluster.ranks_per_node)
    between = 2 * nodes if nodes > 1 else 0
    return between * cluster.hop_seconds + max(0, 2 * (num_ranks - 1) - between) * inside


def step_seconds(work: Work, cluster: Cluster, num_ranks: int) -> float:
    return work.step_seconds + exposed_seconds(work, cluster, num_ranks) + agreement_seconds(cluster, num_ranks)


def bytes_of_step(work: Work, num_ranks: int) -> int:
    """That all ranks read of shards."""
    return work.local_sequences * num_ranks * work.record_bytes


def checkpoint_bytes(parameters: float, zero_stage: int, value_bytes: int = VALUE_BYTES) -> float:
    """All files: weights once, and with a ZeRO stage master weights and moments once, cut over the ranks."""
    return parameters * (value_bytes + (OPTIMIZER_BYTES if zero_stage else 8 + 4 * (value_bytes < 4)))


def checkpoint_files(num_ranks: int, zero_stage: int) -> int:
    """DeepSpeed's: a model file (stage 3: one a rank) and an optimizer file a rank; ours: a state a rank, and two."""
    model_files = num_ranks if zero_stage == 3 else 1
    optimizer_files = num_ranks if zero_stage else 0
    return model_files + optimizer_files + FILES_OF_RANK_STATE * num_ranks + FILES_OF_CHECKPOINT


def write_seconds(work: Work, cluster: Cluster, num_ranks: int) -> float:
    """In the background. Under stages 1 and 2 rank 0 writes the weights alone."""
    nodes = -(-num_ranks // cluster.ranks_per_node)
    whole = checkpoint_bytes(work.parameters, work.zero_stage)
    together = whole / min(cluster.store, nodes * cluster.node_store)
    alone = VALUE_BYTES * work.parameters / cluster.node_store if work.zero_stage < 3 else 0.0
    return max(together, alone)


def weights_seconds(parameters: float, cluster: Cluster, num_ranks: int) -> float:
    """Every node reads the same file; its other ranks find it in the node's page cache."""
    nodes = -(-num_ranks // cluster.ranks_per_node)
    num_bytes = VALUE_BYTES * parameters
    return max(num_bytes / cluster.node_store, nodes * num_bytes / cluster.store)


def start_seconds(work: Work, cluster: Cluster, num_ranks: int, manifest_seconds: float) -> float:
    """Imports, the manifest (parsed by every rank; its broadcast is small beside that), the teacher's weights."""
    return (
        cluster.import_seconds
        + manifest_seconds
        + weights_seconds(work.teacher_parameters + work.parameters, cluster, num_ranks)
    )


def universal_bytes(parameters: float, num_ranks: int) -> float:
    """That all ranks read to go on under stage 3 after another number of ranks: each reads every parameter's master
    weight and moments whole, and keeps its share."""
    return num_ranks * OPTIMIZER_BYTES * parameters


def resume_seconds(work: Work, cluster: Cluster, num_ranks: int, manifest_seconds: float) -> float:
    """A start, and the checkpoint: each rank its own share, and under stages 1 and 2 the weights on every node.

    On the ranks that wrote it; on another number ``universal_bytes`` are read.
    """
    nodes = -(-num_ranks // cluster.ranks_per_node)
    own = OPTIMIZER_BYTES * work.parameters / min(cluster.store, nodes * cluster.node_store)
    weights = weights_seconds(work.parameters, cluster, num_ranks)
    if work.zero_stage == 3:
        weights = VALUE_BYTES * work.parameters / min(cluster.store, nodes * cluster.node_store)
    return start_seconds(work, cluster, num_ranks, manifest_seconds) + own + weights


@dataclass(frozen=True)
class Opened:
    """Files opened, listed or asked for their size by all ranks together."""

    start: int
    """configuration, tokenizer, weights, and the shards of the first step; rank 0 alone reads manifests"""
    resume: int
    """beside those of a start"""
    checkpoint: int
    """files made, renamed or removed"""


MAIN_OPENS_AT_START = 2
"""manifest.json and token_counts.npy; two more manifests with held-out text and a cache"""
RANK_OPENS_AT_START = 8
"""the run's YAML, the DeepSpeed JSON, tokenizer.json and its config, the models' config.json and weights, each once"""


def opened(num_ranks: int, zero_stage: int, shards_of_first_step: int) -> Opened:
    """``shards_of_first_step`` counts pairs of rank and shard. A rank that resumes looks for COMPLETE and reads
    meta.json, the weights, its optimizer file and its state, and lists the folder once."""
    made = checkpoint_files(num_ranks, zero_stage)
    marks = 4 * num_ranks  # each rank's mark: made, renamed, read and removed by rank 0
    return Opened(
        start=MAIN_OPENS_AT_START + RANK_OPENS_AT_START * num_ranks + OPENS_OF_SHARD * shards_of_first_step,
        resume=6 * num_ranks,
        checkpoint=made + marks + made,  # and an old one is removed
    )


def opens_of_epoch(num_shards: int, lanes: int) -> int:
    """A shard is opened by each rank whose lanes meet it: once, and once more for each cut between lanes."""
    return OPENS_OF_SHARD * (num_shards + lanes - 1)


def growths(work: Work, cluster: Cluster, ranks: int) -> dict[str, str]:
    """What does not stay flat as ranks are added, by our own code or by what it stands on."""
    universal = universal_bytes(work.parameters, ranks)
    return {
        "gloo's connections": f"quadratic, {ranks * (ranks - 1) // 2:,} in all and {ranks - 1:,} a rank: allow as many "
        "open files",
        "names in a checkpoint's folder, listed by each resuming rank": f"quadratic, {ranks * 2 * ranks:,} in all "
        "(DeepSpeed's glob)",
        "the small all-reduce of a step (gloo's ring)": "linear in time, in 'step s' above",
        "a resume on another number of ranks, stage 3": f"linear, {universal / ranks / 1e9:,.1f} GB on every rank and "
        f"{universal / 1e12:,.1f} TB in all, {universal / cluster.store:,.0f} s of the store (DeepSpeed's universal "
        "form; not in 'resume s' above)",
        "the same weights read by every node": "linear, in 'start s' above: a store must give one file to all at once",
    }
