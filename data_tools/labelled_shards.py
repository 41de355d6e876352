"""Labelled examples to shards, one example a sample: what build_shards.py does for tasks with labels of their own."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.example_encoding import Encoded, EncodingSpec, ExampleEncoder, encode_examples, make_encoder
from data_tools.examples import OUTSIDE, Columns, Example, read_examples
from data_tools.processes import map_in_order, process_pool
from data_tools.readers import lines_of
from data_tools.shard_folder import ShardFolder
from data_tools.shard_stream import HELDOUT, is_heldout, refuse_newer, stamped, wanted_manifest
from data_tools.sizes import show_bytes
from engine.data.manifest import MANIFEST, Manifest
from engine.errors import DataError
from engine.log import Progress
from engine.redaction import redact_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABELS_FILE = "labels.tsv"
_BATCH_EXAMPLES = 256
_SHOW_EVERY = 1024


def build_labelled(inputs: list[str], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> int:
    """Read, tokenise and write. Raises ConfigError and DataError."""
    has_labels = _has_labels(inputs, options)
    labels = _labels(inputs, options)
    spec = EncodingSpec(
        options.task,
        options.tokenizer,
        options.sequence_tokens,
        labels,
        options.overlap_tokens,
        options.question_tokens,
    )
    ExampleEncoder(spec)  # what it refuses is refused before any folder is made
    wanted = replace(
        wanted_manifest(tokenizer, options), labels=labels, has_labels=has_labels, command=_command(options)
    )
    folders = [(options.output, False)]
    if options.split_heldout:
        folders.insert(0, (options.output / HELDOUT, True))  # the main manifest comes last
    for folder, heldout in folders:
        _fill(folder, wanted, spec, inputs, options, heldout)
    return 0


def _fill(
    folder: Path, wanted: Manifest, spec: EncodingSpec, inputs: list[str], options: argparse.Namespace, heldout: bool
) -> None:
    started = time.monotonic()
    source = [stamped(inputs), heldout]
    with ShardFolder(folder, wanted, source, overwrite=options.overwrite) as shards:
        if shards.manifest is not None:
            refuse_newer(inputs, folder / MANIFEST)
            print(f"{folder}: complete already, nothing to do (--overwrite builds it anew)")
            return
        start = shards.position[0] if shards.position else 0
        num_examples = num_cut = 0
        examples = islice(_examples(inputs, options, wanted.has_labels, heldout), start, None)
        with Progress(total=None, label="examples") as progress, closing(_encoded(examples, spec, options)) as encoded:
            for num_examples, samples in enumerate(encoded, start + 1):
                num_cut += any(sample.is_cut for sample in samples)
                for sample in samples:
                    whole = np.array([len(sample.token_ids)], np.uint32)
                    shards.add(sample.token_ids, whole, annotation=sample.annotation)
                if shards.shard_bytes >= options.shard_bytes:
                    shards.cut([num_examples])
                if num_examples % _SHOW_EVERY == 0:
                    progress.update(num_examples)
        shards.cut([num_examples])
        if shards.num_shards == 0:
            raise DataError(f"no example for {folder}; give more input, or another --split-heldout")
        manifest = shards.finish(num_examples)
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    print(
        f"{folder}: {manifest.num_documents:,} examples, {manifest.num_tokens:,} tokens, {manifest.num_samples:,} "
        f"sequences, {len(manifest.shards)} shards, {show_bytes(num_bytes)} in {time.monotonic() - started:.1f} s"
    )
    if num_cut:
        print(f"{num_cut:,} examples were longer than {options.sequence_tokens} tokens and were cut")


def _encoded(
    examples: Iterator[Example], spec: EncodingSpec, options: argparse.Namespace
) -> Generator[list[Encoded], None, None]:
    """The samples of each example, in order, whatever the number of processes."""
    batches = iter(lambda: list(islice(examples, _BATCH_EXAMPLES)), [])
    if options.workers == 1:
        encoder = ExampleEncoder(spec)
        for batch in batches:
            yield from encoder(batch)
        return
    pool = process_pool(options.workers, make_encoder, spec)
    with closing(map_in_order(((None, batch) for batch in batches), encode_examples, pool, options.workers)) as made:
        for _, samples in made:
            yield from samples


def _examples(
    inputs: list[str], options: argparse.Namespace, has_labels: bool, heldout: bool | None
) -> Iterator[Example]:
    """Those of one side of the split, or all. Raises DataError for an empty file, or where some have no labels."""
    for path in inputs:
        is_empty = True
        for example in _read(path, options):
            is_empty = False
            known = example.labels is not None or getattr(example, "answers", None) is not None
            if known != has_labels:
                raise DataError(
                    f"{example.where}: {'labels' if known else 'no labels'}, unlike the examples before; give labelled "
                    "and unlabelled data to different folders, or --unlabelled"
                )
            if heldout is None or is_heldout(example.text, options) == heldout:
                yield example
        if is_empty:
            raise DataError(f"{path}: holds no examples")


def _read(path: str, options: argparse.Namespace) -> Iterator[Example]:
    columns = Columns(options.text_column, options.second_column, options.label_column, options.columns)
    return read_examples(options.task, path, columns, unlabelled=options.unlabelled)


def _has_labels(inputs: list[str], options: argparse.Namespace) -> bool:
    first = next((example for path in inputs for example in _read(path, options)), None)
    if first is None:
        raise DataError(f"{', '.join(inputs)}: no examples")
    return first.labels is not None or getattr(first, "answers", None) is not None


def _labels(inputs: list[str], options: argparse.Namespace) -> tuple[str, ...]:
    """Names of the classes: of --labels, of labels.tsv beside the input, or all that the input has, sorted."""
    if options.task == "question_answering":
        return ()
    beside = Path(inputs[0]).with_name(LABELS_FILE)
    path = options.labels or (str(beside) if beside.is_file() else None)
    if path is not None:
        return _labels_in(path)
    found = {label for source in inputs for example in _read(source, options) for label in example.labels or ()}
    if not found:
        raise DataError(
            f"{inputs[0]}: has no labels; give --labels FILE, with a label a line or the manifest.json of shards that "
            "have some"
        )
    return tuple(sorted(found, key=lambda label: (label != OUTSIDE, label)))


def _labels_in(path: str) -> tuple[str, ...]:
    if Path(path).name == MANIFEST:
        labels = Manifest.from_json(Path(path).read_text(), path).labels
    else:
        labels = tuple(text for text in (line.strip() for line in lines_of(path)) if text)
    if not labels or len(set(labels)) != len(labels):
        raise DataError(f"{path}: {len(labels)} labels, {len(set(labels))} of them different; expected each once")
    return labels


def _command(options: argparse.Namespace) -> str:
    """The command without what does not change the result."""
    words = ["python", "data_tools/build_shards.py", "--task", options.task, "--input", *options.input]
    words += ["--tokenizer", options.tokenizer, "--sequence-tokens", str(options.sequence_tokens)]
    words += ["--shard-bytes", str(options.shard_bytes), "--split-heldout", repr(options.split_heldout)]
    if options.task == "question_answering":
        words += ["--overlap-tokens", str(options.overlap_tokens), "--question-tokens", str(options.question_tokens)]
    if options.task == "sequence_classification":
        words += ["--text-column", options.text_column, "--label-column", options.label_column]
        words += ["--second-column", options.second_column] if options.second_column else []
        words += ["--columns", ",".join(options.columns)] if options.columns else []
    words += ["--unlabelled"] if options.unlabelled else []
    return shlex.join(redact_words(words))
