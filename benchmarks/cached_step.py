"""What a teacher cache costs: a step that trains from it, decoding it, and making it.

- step: forward and backward of one micro-batch and AdamW on the run's student, loaded and decoded beside it by the
  run's own loader: cross entropy alone, the run's terms from the cache, and the run's terms with the teacher online
- decode: records to ids and probabilities on one core, and on to the tensors of a batch
- capture: the whole of a caching job's work on a batch against the bare forward pass of the teacher, logits included

Ways take turns. The run's cache must be there for step and decode: launch/cache_teacher.py makes it.

    python benchmarks/cached_step.py --config run.yaml [--parts capture] [--output FILE.json] [key.path=value ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import by_turns, leave_nothing_behind, print_table, write_json

from engine.asking import Asker
from engine.cache.sidecar import Record
from engine.config.load import load_config
from engine.config.run import RunConfig, TeacherSection
from engine.config.terms import CrossEntropy
from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.dist import Control, Ranks
from engine.losses.layers import Shape
from engine.losses.objective import Objective, StepContext
from engine.parts import Parts, Place, build_parts
from engine.student.module import StudentWithObjective
from engine.teacher.cached import CachedTargets
from engine.teacher.online import OnlineTeacher
from engine.teacher.source import NoTeacher, TargetSource

CPU = torch.device("cpu")


def main() -> None:
    arguments = parse_arguments()
    leave_nothing_behind()
    config = load_config(arguments.config, arguments.overrides)
    figures: dict[str, Any] = {"settings": vars(arguments) | {"output": None}}
    for part in arguments.parts:
        figures[part] = PARTS[part](config, arguments)
    write_json(arguments.output, figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=180.0, help="of each part at most")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_intermixed_args()


def parts_of(config: RunConfig) -> Parts:
    ranks = Ranks(0, 1, 0)
    return build_parts(config, Place(ranks, Control(ranks), CPU))


class Training:
    """The run's student and loader, one micro-batch a call."""

    def __init__(self, config: RunConfig, kind: str) -> None:
        if kind == "cross entropy":
            labels_alone = (CrossEntropy(kind="cross_entropy"),)
            config = config.model_copy(update={"losses": labels_alone, "teacher": TeacherSection()})
        if kind == "online":
            teacher = config.teacher.model_copy(update={"kind": "online", "cache": None})
            config = config.model_copy(update={"teacher": teacher})
        parts = parts_of(config)
        student, manifest = parts.student.model, parts.shards.manifest
        shape = Shape(student.config.hidden_size, student.config.num_hidden_layers)
        objective = Objective(
            config.losses, num_steps=10**6, num_ids=manifest.vocab_size, student=shape, teacher=None
        )  # fmt: skip
        self._module = StudentWithObjective(student, objective, parts.task).train()
        self._optimizer = torch.optim.AdamW(self._module.parameters(), lr=1e-4)
        cached = None
        self._source: TargetSource = NoTeacher()
        if kind == "from the cache":
            assert parts.cache is not None
            self._source = cached = CachedTargets(parts.cache, manifest, config.teacher.tail, CPU)
        elif parts.teacher is not None:
            self._source = OnlineTeacher(parts.teacher, parts.task, hidden_states=False)
        order = DataOrder(manifest.samples_per_shard, seed=0, lanes=config.data.lanes, shuffle_samples=64)
        micro = config.batch.micro_sequences
        loader = Loader(parts.shards, order, parts.task.label, num_steps=10**6, global_sequences=micro,
                        micro_sequences=micro, cached=cached)  # fmt: skip
        self._steps: Iterator[Any] = loader.steps()

    def __call__(self) -> None:
        (batch,) = next(self._steps).micro_batches
        targets = self._source.targets_for(batch, batch.label_rows)
        loss, _, _ = self._module(batch, targets, StepContext(0, batch.num_labels, batch.num_tokens, False))
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def time_steps(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    ways = {kind: Training(config, kind) for kind in ("cross entropy", "from the cache", "online")}
    seconds = by_turns(ways, arguments.turns, arguments.seconds)
    return show("step", seconds, "cross entropy")


def time_decoding(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of records of whole micro-batches of 8, one thread."""
    parts = parts_of(config)
    assert parts.cache is not None
    manifest = parts.shards.manifest
    source = CachedTargets(parts.cache, manifest, config.teacher.tail, CPU)
    order = DataOrder(manifest.samples_per_shard, seed=0, lanes=1, shuffle_samples=64)
    places = [order.locate(number) for number in range(8)]
    samples = [parts.shards.read(place.shard, place.index) for place in places]
    records = [record for place in places if isinstance(record := source.fetch(place), Record)]
    labelled = parts.task.label(samples, [0] * len(samples))
    loader = Loader(parts.shards, order, parts.task.label, num_steps=1, global_sequences=8, micro_sequences=8)
    (batch,) = next(loader.steps()).micro_batches
    contents = [record.content for record in records]
    assert source._codec is not None
    codec = source._codec
    ways: dict[str, Callable[[], Any]] = {
        "to ids and probabilities": lambda: codec.decode(contents),
        "to the tensors of a batch": lambda: source.targets(records, samples, labelled, batch),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name, way in ways.items():
        best, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < 4.0:
            start = time.perf_counter()
            way()
            best = min(best, time.perf_counter() - start)
        found[name] = batch.num_labels / best
    torch.set_num_threads(threads)
    print_table(["decode, one core", "positions/s"], [[name, f"{rate:,.0f}"] for name, rate in found.items()])
    return found | {"bytes_a_position": sum(map(len, contents)) / batch.num_labels}


def time_capture(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same batches, a turn each; the bare forward is transformers' own, in inference mode."""
    asker = Asker(config, CPU)
    batches = [asker.batch(0, number) for number in range(min(2, asker.num_batches(0)))]
    asked = [asker._read(*batch) for batch in batches]
    model, tap = asker.teacher.model, asker.teacher.reader.tap

    @torch.inference_mode()
    def bare() -> None:
        with tap.removed():
            for each in asked:
                model(**asker._task.model_inputs(each.batch, model))

    ways: dict[str, Callable[[], Any]] = {
        "bare forward": bare,
        "forward, choice, code": lambda: list(asker.answers(batches)),
    }
    return show("capture", by_turns(ways, arguments.turns, arguments.seconds), "bare forward")


def show(title: str, seconds: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Ratios are medians of the turns' own, since the machine's speed wanders."""
    rows = []
    found: dict[str, Any] = {"seconds": seconds, "ratio": {}}
    for name, turns in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(turns, seconds[base]))
        found["ratio"][name] = ratio
        rows.append([name, f"{min(turns):.4f}", f"{statistics.median(turns):.4f}", f"{ratio:.3f}"])
    print_table([title, "best s", "median s", "ratio"], rows)
    return found


PARTS = {"step": time_steps, "decode": time_decoding, "capture": time_capture}

if __name__ == "__main__":
    main()
