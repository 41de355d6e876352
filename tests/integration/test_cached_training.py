"""Training from a cache is training with the teacher, whatever changes between the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Distiller
from engine.cache.folder import CacheFolder
from engine.cache.sidecar import INDEX_DTYPE
from engine.capture import try_capture
from engine.checkpoint import newest
from engine.config.load import parse_config
from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.dist import Control, Ranks
from engine.parts import Parts, Place, build_parts
from engine.schema import DenseTargets, SparseTargets
from engine.teacher.cached import CachedTargets
from engine.teacher.online import OnlineTeacher
from engine.zero import consolidate
from tests import tiny
from tests.caching import cached_run, make_cache
from tests.launching import distill, finish

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(cached_task: str) -> str:
    return cached_task


@pytest.fixture(scope="module")
def root(cached_root: Path) -> Path:
    return cached_root


def records(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def trained(config: dict[str, Any], name: str) -> Path:
    config["run"] = config["run"] | {"name": name}
    Distiller(config).fit()
    return Path(config["run"]["output"]) / name


def parts_of(config: dict[str, Any]) -> Parts:
    return build_parts(parse_config(config), Place(Ranks(0, 1, 0), Control(Ranks(0, 1, 0)), CPU))


def test_whole_states_train_the_very_same_student(root: Path, task: str) -> None:
    """Two epochs, so that masks change. Terms and temperatures that no other codec serves."""
    losses = [
        {"kind": "reverse_kl", "temperature": {"start": 1.0, "end": 3.0}},
        {"kind": "js"},
        {"kind": "logits_mse"},
        {"kind": "cross_entropy"},
    ]
    steps = {"num_steps": 24, "num_epochs": None}
    online = trained(tiny.run_config(root, task, losses=losses, run=steps) | {"task": cached_run(root, task)["task"]},
                     "online")  # fmt: skip
    cached = trained(cached_run(root, task, "hidden", losses=losses, run=steps), "cached")
    one, other = (consolidate(newest(folder / "checkpoints")) for folder in (online, cached))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert records(online, "teacher/perplexity") == records(cached, "teacher/perplexity")


@pytest.mark.parametrize(("dtype", "near"), [("bf16", 0.01), ("fp16", 0.002), ("fp8", 0.06)])
def test_states_in_fewer_bits_train_to_their_error(root: Path, task: str, dtype: str, near: float) -> None:
    losses = [{"kind": "reverse_kl", "temperature": 2.0}]
    few = {"codec": {"kind": "hidden", "dtype": dtype}}
    make_cache(cached_run(root, task, "hidden", teacher={"cache": dtype}, cache=few))
    online = cached_run(root, task, teacher={"kind": "online", "cache": None}, losses=losses)
    theirs = trained(online, f"whole-{dtype}")
    ours = trained(cached_run(root, task, "hidden", teacher={"cache": dtype}, cache=few, losses=losses), dtype)
    assert records(ours, "loss/reverse_kl") == pytest.approx(records(theirs, "loss/reverse_kl"), rel=near)
    assert records(ours, "teacher/perplexity") == pytest.approx(records(theirs, "teacher/perplexity"), rel=near)


def test_a_fine_top_k_of_all_ids_is_the_teacher(root: Path, task: str) -> None:
    make_cache(cached_run(root, task, "top_k", teacher={"cache": "all"},
                          cache={"codec": {"kind": "top_k", "k": 96, "max_error": 0.001}}))  # fmt: skip
    online = cached_run(root, task, teacher={"kind": "online", "cache": None})
    for kind in ("forward_kl", "reverse_kl"):
        losses = [{"kind": kind}]
        ours = trained(cached_run(root, task, teacher={"cache": "all"}, losses=losses), f"all-{kind}")
        theirs = trained(online | {"losses": losses}, f"online-{kind}")
        for name in (f"loss/{kind}", "kl/temperature_1", "teacher/perplexity"):
            assert records(ours, name) == pytest.approx(records(theirs, name), rel=2e-3), name
        agreed = "agreement/top1"  # of two ids that are as likely to a level, the other one may be taken
        assert records(ours, agreed) == pytest.approx(records(theirs, agreed), abs=0.05)


@pytest.mark.parametrize("codec", ["sampled", "proposal"])
def test_draws_train_towards_the_teacher(root: Path, task: str, codec: str) -> None:
    online = trained(cached_run(root, task, teacher={"kind": "online", "cache": None}), f"for-{codec}")
    heldout = {"manifest": str(root / "heldout" / "manifest.json")}
    cached = trained(cached_run(root, task, codec, evaluation=heldout), f"draws-{codec}")
    means = [sum(records(folder, "loss/forward_kl")) for folder in (cached, online)]
    assert means[0] == pytest.approx(means[1], rel=0.15)
    assert records(cached, "teacher/perplexity") == pytest.approx(records(online, "teacher/perplexity"), rel=1e-5)
    assert (cached / "export").is_dir()
    models = json.loads((cached / "results.json").read_text())["models"]
    roles = {model["role"] for model in models}
    assert {"teacher", "student"} <= roles, "the teacher's weights are named, so it is scored beside the student"


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"run": {"seed": 11}},
    "epochs": {"run": {"num_steps": 40}},
    "micro": {"batch": {"micro_sequences": 4}},
    "whole": {"batch": {"micro_sequences": 8}},
    "global": {"batch": {"global_sequences": 4, "micro_sequences": 1}},
    "lanes": {"data": {"lanes": 2}},
    "window": {"data": {"shuffle_samples": 100}},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_targets_stay_with_their_samples(root: Path, task: str, change: str, world_size: int) -> None:
    """The teacher is asked again for every batch of every rank, and says what the cache says."""
    config = cached_run(root, task, "hidden", **CHANGES[change])
    parts = parts_of(config)
    assert parts.cache is not None
    assert parts.teacher is None
    source = CachedTargets(parts.cache, parts.shards.manifest, "bucket", CPU)
    online = parts_of(tiny.run_config(root, task))
    assert online.teacher is not None
    teacher = OnlineTeacher(online.teacher, parts.task, hidden_states=False)
    data, run = parts.run.config.data, parts.run
    order = DataOrder(parts.shards.manifest.samples_per_shard, seed=run.config.run.seed, lanes=data.lanes,
                      shuffle_samples=data.shuffle_samples)  # fmt: skip
    seen = 0
    for rank in range(world_size):
        loader = Loader(
            parts.shards,
            order,
            parts.task.label,
            num_steps=run.num_steps,
            global_sequences=run.batch.global_sequences,
            micro_sequences=min(run.batch.micro_sequences, run.batch.global_sequences // world_size),
            rank=rank,
            world_size=world_size,
            reader_threads=2,
            cached=source,
        )
        for step in loader.steps():
            for batch in step.micro_batches:
                targets = source.targets_for(batch, batch.label_rows)
                assert isinstance(targets, DenseTargets)
                assert torch.allclose(
                    targets.hidden, teacher.targets_for(batch, batch.label_rows).hidden, atol=2e-5, rtol=1e-4
                )
                seen += len(batch.names)
    assert seen == run.num_steps * run.batch.global_sequences


def test_ranks_and_stages_change_nothing(root: Path, task: str) -> None:
    config = cached_run(root, task, run={"name": "one"})
    finish(distill(config, root / "one", 1))
    other = cached_run(root, task, run={"name": "two"}, zero={"zero_optimization": {"stage": 3}},
                       batch={"micro_sequences": 4})  # fmt: skip
    finish(distill(other, root / "two", 2))
    one, two = (consolidate(newest(root / "runs" / name / "checkpoints")) for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=2e-4, rtol=2e-3), name


def test_kept_ids_and_draws_are_the_teachers(root: Path, task: str) -> None:
    """Recomputed from the teacher's logits, position by position."""
    teacher_parts = parts_of(tiny.run_config(root, task) | {"task": cached_run(root, task)["task"]})
    assert teacher_parts.teacher is not None
    teacher = OnlineTeacher(teacher_parts.teacher, teacher_parts.task, hidden_states=False)
    for codec in ("sampled", "top_k", "top_p"):
        parts = parts_of(cached_run(root, task, codec))
        assert parts.cache is not None
        source = CachedTargets(parts.cache, parts.shards.manifest, "bucket", CPU)
        order = DataOrder(parts.shards.manifest.samples_per_shard, seed=5, lanes=4, shuffle_samples=8)
        loader = Loader(parts.shards, order, parts.task.label, num_steps=30, global_sequences=8, micro_sequences=8,
                        cached=source)  # fmt: skip
        for step in loader.steps():
            (batch,) = step.micro_batches
            kept = batch.cached
            assert isinstance(kept, SparseTargets)
            dense = teacher.targets_for(batch, batch.label_rows)
            logits = dense.hidden @ dense.head.weight.t()
            logits = logits if dense.head.bias is None else logits + dense.head.bias
            p = torch.softmax(logits.double(), dim=1)
            weights = torch.zeros_like(p).scatter_add_(1, kept.ids, kept.weights.double())
            if codec == "sampled":
                assert ((weights - p).abs() < 1 / 20 + 1e-5).all(), "an id's count is within one of its expectation"
                assert torch.allclose(weights.sum(dim=1), torch.ones(len(p), dtype=torch.float64))
            else:
                inside = weights > 0
                error = (weights[inside].log() - p[inside].log()).abs()
                assert error.max() < 0.06
                assert kept.tail is not None
                assert torch.allclose(p.sum(dim=1) - (p * inside).sum(dim=1), kept.tail.double(), atol=2e-3)
                lowest = torch.where(inside, p, 2.0).amin(dim=1)
                assert (torch.where(inside, 0.0, p).amax(dim=1) <= lowest + 1e-6).all(), "the likeliest are kept"
            if codec == "top_k":
                assert (inside.sum(dim=1) == 12).all()
            per_sample = torch.zeros(len(batch.names)).index_add_(
                0, batch.label_rows // batch.labels.shape[1], kept.nll
            )  # fmt: skip
            labels = batch.labels.flatten()[batch.label_rows]
            nll = -p.gather(1, labels.unsqueeze(1)).squeeze(1).log().float()
            expected = torch.zeros(len(batch.names)).index_add_(0, batch.label_rows // batch.labels.shape[1], nll)
            assert torch.allclose(per_sample, expected, rtol=1e-4)


def test_a_resumed_run_goes_on_bit_for_bit(root: Path, task: str) -> None:
    straight = trained(cached_run(root, task, run={"num_steps": 8}, schedule={"kind": "constant"}), "straight")
    for steps in (5, 8):
        stopped = trained(cached_run(root, task, run={"num_steps": steps}, schedule={"kind": "constant"}), "stopped")
    one, other = (consolidate(newest(folder / "checkpoints")) for folder in (straight, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("codec", ["sampled", "top_p", "hidden"])
def test_a_trial_foretells_the_size(root: Path, task: str, codec: str) -> None:
    """From a quarter of the samples; what is small change in a cache of any size is left out."""
    config = parse_config(cached_run(root, task, codec))
    trial = try_capture(config, CPU, 24 * (3 if task == "masked_lm" else 1))
    folder = root / "train" / codec
    records = sum(CacheFolder.open(str(folder / "cache.json")).sidecar(entry).header.record_bytes
                  for entry in parts_of(cached_run(root, task, codec)).shards.manifest.shards)  # fmt: skip
    num_records = 96 * (3 if task == "masked_lm" else 1)
    assert trial.cache_bytes == pytest.approx(records + num_records * INDEX_DTYPE.itemsize, rel=0.04)
    assert trial.hours > 0.0
