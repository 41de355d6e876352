"""Text to shards of packed token sequences.

    python data_tools/build_shards.py --task masked_lm --input 'corpus/*.txt' --tokenizer bert-base-uncased \\
        --sequence-tokens 512 --output shards

With ``--part I/N`` a job does one of N parts of the work, anywhere; with ``--merge N`` another packs them all.
The same input and settings give the same bytes, whatever the number of workers and parts, and however often it was
killed and started again. docs/data.md describes the inputs and the format.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.dealing import Share, deal, is_own, parse_share
from data_tools.labelled_shards import build_labelled
from data_tools.packing import Packer, framing_of
from data_tools.parts import PartFolder, Parts, remove_parts
from data_tools.pieces import Kind, Place, Tokenised
from data_tools.readers import find_inputs, read_documents
from data_tools.shard_folder import clear, refuse_other_settings
from data_tools.shard_stream import HELDOUT, START, Stream, is_heldout, refuse_newer, stamped, wanted_manifest
from data_tools.sizes import byte_count, show_bytes
from data_tools.tokenizing import TokenizerSpec, encode_in_order
from engine.data.manifest import ANNOTATED_TASKS, MANIFEST, Manifest
from engine.errors import DataError
from engine.log import Progress, run_main
from engine.tasks.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = ("masked_lm", "causal_lm", *sorted(ANNOTATED_TASKS))
_SHOW_EVERY = 256
_Tag = tuple[Place, Kind]


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    try:
        return build(options)
    except OSError as problem:
        raise DataError(f"{options.output}: {problem}; run the same command again to go on from there") from problem


def build(options: argparse.Namespace) -> int:
    """Read, tokenise, pack and write, or one half of it. Raises ConfigError and DataError."""
    inputs = find_inputs(options.input, any_ending=options.task in ("token_classification", "question_answering"))
    tokenizer = load_tokenizer(options.tokenizer)
    if options.task in ANNOTATED_TASKS:
        return build_labelled(inputs, tokenizer, options)
    if options.part:
        return _build_part(inputs, tokenizer, options)
    started = time.monotonic()
    parts = None
    if options.merge and (options.overwrite or not (options.output / MANIFEST).exists()):
        parts = Parts(options.output, options.merge, wanted_manifest(tokenizer, options), stamped(inputs))
    with ExitStack() as open_streams:
        training = open_streams.enter_context(Stream(options.output, tokenizer, inputs, options))
        heldout = None
        if options.split_heldout:
            heldout = open_streams.enter_context(Stream(options.output / HELDOUT, tokenizer, inputs, options))
        elif options.overwrite:
            clear(options.output / HELDOUT)  # those documents are now trained on
        streams = [training, heldout] if heldout else [training]
        if all(stream.is_complete for stream in streams):
            _say_complete(inputs, options)
            remove_parts(options.output, options.merge)
            return 0
        source = _Merged(parts, streams) if parts else _Texts(inputs, tokenizer, options, streams)
        with Progress(total=None, label="documents") as progress:
            for stream, document, ids in source:
                stream.feed(document, ids)
                if document % _SHOW_EVERY == 0:
                    progress.update(document + 1, {"tokens": f"{sum(s.num_tokens for s in streams):,}"})
        for stream in reversed(streams):  # the main manifest comes last
            stream.finish()
    remove_parts(options.output, options.merge)
    _print_summary(streams, source.num_empty, time.monotonic() - started)
    return 0


def _build_part(inputs: list[str], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> int:
    """Tokenise one share of the documents and leave them for the merge."""
    share, wanted = options.part, wanted_manifest(tokenizer, options)
    Packer(framing_of(tokenizer, options.task), options.sequence_tokens, START)  # what it refuses is refused now
    if (manifest := options.output / MANIFEST).exists() and not options.overwrite:
        refuse_other_settings(manifest, Manifest.from_json(manifest.read_text(), str(manifest)), wanted)
        _say_complete(inputs, options)
        return 0
    started = time.monotonic()
    with PartFolder(options.output, share, wanted, stamped(inputs), overwrite=options.overwrite) as part:
        if part.is_complete:
            print(f"{part.folder}: complete already, nothing to do (--overwrite makes it anew)")
            return 0
        texts = _texts_of_part(inputs, options, part.next)
        with Progress(total=None, label="documents") as progress:
            for (place, kind), ids in encode_in_order(texts, TokenizerSpec.of(tokenizer), options.workers):
                part.add(Tokenised(place, kind, ids))
                if part.num_documents % _SHOW_EVERY == 0:
                    progress.update(part.num_documents, {"tokens": f"{part.num_tokens:,}"})
        part.finish()
    seconds = time.monotonic() - started
    print(f"part {share}: {part.num_documents:,} documents, {part.num_tokens:,} tokens in {part.folder}")
    print(f"{part.num_tokens:,} tokens in {seconds:.1f} s: {part.num_tokens / seconds:,.0f} tokens/s")
    return 0


def _texts_of_part(inputs: list[str], options: argparse.Namespace, start: Place) -> Iterator[tuple[_Tag, str]]:
    share: Share = options.part
    owners = deal([size for _, size, _ in stamped(inputs)], share.num_parts)
    for source, owner in enumerate(owners):
        if source < start.source or owner not in (None, share.number):
            continue
        for document, text in enumerate(_documents(inputs[source], options)):
            place = Place(source, document)
            if place < start or not is_own(owner, document, share):
                continue
            if text.strip():
                yield (place, Kind.HELDOUT if is_heldout(text, options) else Kind.TRAINING), text
            else:
                yield (place, Kind.EMPTY), ""


_Wanted = tuple[Stream, int, np.ndarray]


class _Texts:
    """The documents still to be packed, tokenised here: each with the stream that wants it, and its number."""

    def __init__(
        self,
        inputs: list[str],
        tokenizer: PreTrainedTokenizerBase,
        options: argparse.Namespace,
        streams: Sequence[Stream],
    ) -> None:
        self.num_empty = 0
        self._inputs, self._tokenizer, self._options, self._streams = inputs, tokenizer, options, streams

    def __iter__(self) -> Iterator[_Wanted]:
        spec = TokenizerSpec.of(self._tokenizer)
        for (stream, document), ids in encode_in_order(self._read(), spec, self._options.workers):
            yield stream, document, ids

    def _read(self) -> Iterator[tuple[tuple[Stream, int], str]]:
        texts = chain.from_iterable(_documents(source, self._options) for source in self._inputs)
        for document, text in enumerate(texts):
            stream = self._streams[is_heldout(text, self._options)]
            if not text.strip():
                self.num_empty += 1
            elif stream.wants(document):
                yield (stream, document), text


class _Merged:
    """As _Texts, of documents that the parts have tokenised."""

    def __init__(self, parts: Parts, streams: Sequence[Stream]) -> None:
        self.num_empty = 0
        self._parts, self._streams = parts, streams

    def __iter__(self) -> Iterator[_Wanted]:
        for document, (_, kind, ids) in enumerate(self._parts.documents()):
            if kind == Kind.EMPTY:
                self.num_empty += 1
            elif (stream := self._streams[kind]).wants(document):
                yield stream, document, ids


def _documents(source: str, options: argparse.Namespace) -> Iterator[str]:
    return read_documents(source, text_column=options.text_column, one_per_line=options.one_per_line)


def _say_complete(inputs: list[str], options: argparse.Namespace) -> None:
    refuse_newer(inputs, options.output / MANIFEST)
    print(f"{options.output}: complete already, nothing to do (--overwrite builds it anew)")


def _print_summary(streams: list[Stream], num_empty: int, seconds: float) -> None:
    for stream in streams:
        manifest = stream.manifest
        num_bytes = sum(shard.num_bytes for shard in manifest.shards)
        print(
            f"{stream.folder}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
            f"{manifest.num_samples:,} sequences, {len(manifest.shards)} shards, {show_bytes(num_bytes)}"
        )
    num_tokens = sum(stream.num_tokens for stream in streams)
    print(f"{num_tokens:,} tokens in {seconds:.1f} s: {num_tokens / seconds:,.0f} tokens/s")
    if num_empty:
        print(f"{num_empty:,} empty documents skipped")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--input", required=True, nargs="+", help="files, globs, or data sets (name[:config]:split)")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--sequence-tokens", required=True, type=int, help="tokens of a sequence")
    parser.add_argument("--output", required=True, type=Path, help="folder for the shards")
    parser.add_argument("--split-heldout", type=_fraction, default=0.0, help="share of documents for OUTPUT/heldout")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="tokenizer processes")
    parser.add_argument("--shard-bytes", type=byte_count, default="256MB", help="size of a shard, as in 256MB or 1GiB")
    parser.add_argument("--one-per-line", action="store_true", help="each line of a text file is a document")
    parser.add_argument("--unpacked", action="store_true", help="one document a sequence: see data.sort_samples")
    parser.add_argument("--text-column", default="text", help="column of the text in tables, JSON and data sets")
    parser.add_argument("--overwrite", action="store_true", help="delete the shards that OUTPUT holds, and start anew")
    _add_labelled(parser.add_argument_group("tasks with labels of their own"))
    of_many = parser.add_mutually_exclusive_group()
    of_many.add_argument("--part", type=parse_share, metavar="I/N", help="only tokenise part I of N, from 1/N to N/N")
    of_many.add_argument("--merge", type=int, default=0, metavar="N", help="pack the N parts that are in OUTPUT")
    options = parser.parse_args(argv)
    if options.merge < 0:
        parser.error("--merge must be the number of parts, 1 or more")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if options.task in ANNOTATED_TASKS and (options.part or options.merge):
        parser.error(f"--part and --merge are for text; {options.task} is built in one piece")
    return options


def _add_labelled(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--labels", help="file with a label a line, or a manifest.json (default: labels.tsv beside INPUT)"
    )
    group.add_argument("--unlabelled", action="store_true", help="leave out labels that are there")
    group.add_argument("--label-column", default="label", help="column of the label in tables and JSON")
    group.add_argument("--second-column", help="column of the second text of a pair")
    group.add_argument("--columns", type=_names, metavar="A,B,...", help="columns of a table that has no header")
    group.add_argument("--overlap-tokens", type=int, default=128, help="that windows of a long context share")
    group.add_argument("--question-tokens", type=int, default=64, help="of a question at most")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a share: expected 0 or more, less than 1")
    return value


if __name__ == "__main__":
    run_main(main)
