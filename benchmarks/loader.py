"""The loader against a plain webdataset iteration of the same shards, and a late start against an early one.

Ours reads in the run's order, checks, labels and collates; webdataset only decodes, in file order. Both run in this
process, by turns, so that a slow moment of the machine meets both; of all threads the processor time is counted too.
Needed: twice webdataset's tokens a second, and a first batch at 99% of an epoch within 1.2 times that at step 0.

    python benchmarks/loader.py --output benchmarks/results/loader.json
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from measuring import leave_nothing_behind, write_json
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engine.config.run import TaskSection
from engine.data.loader import Loader
from engine.data.manifest import MANIFEST, Manifest, ShardEntry, write_manifest
from engine.data.order import DataOrder
from engine.data.record import token_dtype
from engine.data.shard_writer import ShardWriter
from engine.data.shards import ShardSet
from engine.tasks.causal_lm import CausalLM
from engine.tasks.masked_lm import MaskedLM
from engine.tasks.task import Task

VOCAB_SIZE = 30_522
NUM_SPECIAL = 5
LANES, SHUFFLE_SAMPLES = 64, 1024
GLOBAL_SEQUENCES, MICRO_SEQUENCES = 64, 8
WEBDATASET = "webdataset"
NEEDED_SPEEDUP, NEEDED_LATE_START = 2.0, 1.2


class Figures(NamedTuple):
    """One number a turn."""

    tokens_per_second: list[float]
    tokens_per_cpu_second: list[float]


def main() -> None:
    arguments = parse_arguments()
    leave_nothing_behind()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        manifest = write_shards(Path(folder), arguments)
        throughput = measure_throughput(manifest, arguments)
        starts = measure_starts(manifest, arguments)
    result = {
        "versions": {"numpy": np.__version__, "webdataset": webdataset.__version__},
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("output", "folder")},
        "throughput": {name: figures._asdict() for name, figures in throughput.items()},
        "first_batch_seconds": starts,
    }
    show(throughput, starts)
    write_json(arguments.output, result)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--folder", help="put the temporary shards there (default: the system's)")
    parser.add_argument("--num-samples", type=int, default=16_384)
    parser.add_argument("--num-shards", type=int, default=8)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--document-tokens", type=int, default=170, help="mean length of the packed documents")
    parser.add_argument("--reader-threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def write_shards(folder: Path, arguments: argparse.Namespace) -> Path:
    """Random tokens with a Zipf-like frequency, packed documents of geometric length."""
    rng = np.random.default_rng(0)
    length, per_shard = arguments.sequence_tokens, arguments.num_samples // arguments.num_shards
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    entries: list[ShardEntry] = []
    for shard in range(arguments.num_shards):
        with ShardWriter(folder / f"shard-{shard:06d}.tar", token_dtype(VOCAB_SIZE)) as writer:
            for number in range(per_shard):
                token_ids = NUM_SPECIAL + (rng.random(length) ** 4 * (VOCAB_SIZE - NUM_SPECIAL)).astype(np.uint16)
                counts += np.bincount(token_ids, minlength=VOCAB_SIZE)
                ends = np.cumsum(rng.geometric(1 / arguments.document_tokens, length))
                bounds = np.concatenate([[0], ends[ends < length], [length]])
                writer.add(f"{shard:06d}-{number:08d}", token_ids, np.diff(bounds))
        assert writer.entry is not None
        entries.append(writer.entry)
    write_manifest(
        folder,
        Manifest("masked_lm", "benchmark", VOCAB_SIZE, 0, length, 0, tuple(entries), "", "benchmarks/loader.py"),
        counts,
    )
    return folder / MANIFEST


def make_tasks(token_counts: np.ndarray) -> dict[str, Task]:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"word{i}" for i in range(NUM_SPECIAL, VOCAB_SIZE))]
    words_to_ids = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_to_ids, unk_token="[UNK]", **special)
    smoothed = TaskSection(kind="masked_lm", mask_smoothing=0.7)
    return {
        "causal_lm": CausalLM(),
        "masked_lm": MaskedLM(TaskSection(kind="masked_lm"), tokenizer, token_counts),
        "masked_lm, smoothed": MaskedLM(smoothed, tokenizer, token_counts),
    }


def make_loader(manifest: Path, task: Task, arguments: argparse.Namespace) -> Loader:
    shards = ShardSet.open(str(manifest))
    order = DataOrder(shards.manifest.samples_per_shard, seed=0, lanes=LANES, shuffle_samples=SHUFFLE_SAMPLES)
    return Loader(
        shards,
        order,
        task.label,
        num_steps=order.sequences_per_epoch // GLOBAL_SEQUENCES,
        global_sequences=GLOBAL_SEQUENCES,
        micro_sequences=MICRO_SEQUENCES,
        reader_threads=arguments.reader_threads,
    )


def measure_throughput(manifest: Path, arguments: argparse.Namespace) -> dict[str, Figures]:
    """One epoch of each way, ``repeats`` times by turns."""

    def ours(task: Task) -> Callable[[], int]:
        return lambda: sum(
            batch.num_tokens for step in make_loader(manifest, task, arguments).steps() for batch in step.micro_batches
        )

    tasks = make_tasks(ShardSet.open(str(manifest)).token_counts())
    ways: dict[str, Callable[[], int]] = {WEBDATASET: lambda: sum(webdataset_tokens(manifest))}
    ways |= {f"ours, {name}": ours(task) for name, task in tasks.items()}
    if importlib.util.find_spec("streaming") is not None:
        mosaic = write_mosaic(manifest)
        ways["mosaicml-streaming"] = lambda: sum(mosaic_tokens(mosaic))
    figures = {name: Figures([], []) for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name, way in ways.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            num_tokens = way()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            if repeat > 0:  # the first round only warms the page cache
                figures[name].tokens_per_second.append(num_tokens / seconds)
                figures[name].tokens_per_cpu_second.append(num_tokens / cpu_seconds)
    return figures


def webdataset_tokens(manifest: Path) -> Iterator[int]:
    urls = sorted(str(path) for path in manifest.parent.glob("shard-*.tar"))
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        yield len(sample["tokens.npy"])


def write_mosaic(manifest: Path) -> Path:
    """The same samples as mosaicml-streaming's own shards."""
    from streaming import MDSWriter

    shards, folder = ShardSet.open(str(manifest)), manifest.parent / "mosaic"
    with MDSWriter(out=str(folder), columns={"tokens": "ndarray", "documents": "ndarray"}) as writer:
        for shard, entry in enumerate(shards.manifest.shards):
            for index in range(entry.num_samples):
                sample = shards.read(shard, index)
                writer.write({"tokens": sample.token_ids, "documents": sample.document_tokens})
    return folder


def mosaic_tokens(folder: Path) -> Iterator[int]:
    from streaming import StreamingDataset

    for sample in StreamingDataset(local=str(folder), shuffle=True, batch_size=MICRO_SEQUENCES):
        yield len(sample["tokens"])


def measure_starts(manifest: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds from an open manifest to the first step, for a fresh loader: at step 0, at 99% of the epoch."""
    seconds: dict[str, list[float]] = {"step 0": [], "99% of the epoch": []}
    for repeat in range(3 * arguments.repeats + 1):
        for name, share in zip(seconds, (0.0, 0.99)):
            loader = make_loader(manifest, CausalLM(), arguments)
            num_steps = arguments.num_samples // GLOBAL_SEQUENCES
            start = time.perf_counter()
            with closing(loader.steps(int(share * num_steps))) as steps:
                next(steps)
                if repeat > 0:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def show(throughput: dict[str, Figures], starts: dict[str, list[float]]) -> None:
    base = throughput[WEBDATASET]
    print(f"{'million tokens a second':<26}{'median':>10}{'least':>10}{'ratio':>8}{'of one CPU':>14}{'ratio':>8}")
    for name, way in throughput.items():
        wall, cpu = way.tokens_per_second, way.tokens_per_cpu_second
        to_wall, to_cpu = ratio(wall, base.tokens_per_second), ratio(cpu, base.tokens_per_cpu_second)
        print(
            f"{name:<26}{statistics.median(wall) / 1e6:>10.2f}{min(wall) / 1e6:>10.2f}{to_wall:>7.2f}x"
            f"{statistics.median(cpu) / 1e6:>14.2f}{to_cpu:>7.2f}x"
        )
    print(f"needed: at least {NEEDED_SPEEDUP}x for each of ours\n")
    print(f"{'first batch, milliseconds':<26}{'median':>10}{'least':>10}{'ratio':>8}")
    for name, seconds in starts.items():
        late = ratio(seconds, starts["step 0"])
        print(f"{name:<26}{1e3 * statistics.median(seconds):>10.2f}{1e3 * min(seconds):>10.2f}{late:>7.2f}x")
    print(f"needed: at most {NEEDED_LATE_START}x")


def ratio(figures: list[float], base: list[float]) -> float:
    """Median of the ratios of the turns: what disturbs a turn disturbs both sides of its ratio."""
    return statistics.median(a / b for a, b in zip(figures, base, strict=True))


if __name__ == "__main__":
    main()
