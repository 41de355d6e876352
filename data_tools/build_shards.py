"""Text to shards of packed token sequences.

    python data_tools/build_shards.py --task masked_lm --input 'corpus/*.txt' --tokenizer bert-base-uncased \\
        --sequence-tokens 512 --output shards

The same input and settings give the same bytes, whatever the number of workers and however often it was killed and
started again. docs/data.md describes the inputs and the format.
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.packing import Packed, Packer, Position, framing_of
from data_tools.readers import find_inputs, read_documents
from data_tools.shard_folder import ShardFolder, clear
from data_tools.sizes import byte_count, show_bytes
from data_tools.tokenizing import TokenizerSpec, encode_in_order
from engine.data.manifest import MANIFEST, Manifest
from engine.data.stateless import fold
from engine.errors import DataError
from engine.log import Progress, run_main
from engine.redaction import redact_words
from engine.tasks.tokenizer import fingerprint, load_tokenizer, vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELDOUT = "heldout"
_SHOW_EVERY = 256


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    try:
        return build(options)
    except OSError as problem:
        raise DataError(f"{problem}; run the same command again to go on after the last finished shard") from problem


def build(options: argparse.Namespace) -> int:
    """Read, tokenise, pack and write. Raises ConfigError and DataError."""
    inputs = find_inputs(options.input)
    tokenizer = load_tokenizer(options.tokenizer)
    started = time.monotonic()
    with ExitStack() as open_streams:
        training = open_streams.enter_context(_Stream(options.output, tokenizer, inputs, options))
        heldout = None
        if options.split_heldout:
            heldout = open_streams.enter_context(_Stream(options.output / HELDOUT, tokenizer, inputs, options))
        elif options.overwrite:
            clear(options.output / HELDOUT)  # those documents are now trained on
        streams = [training, heldout] if heldout else [training]
        if all(stream.is_complete for stream in streams):
            _refuse_newer(inputs, options.output / MANIFEST)
            print(f"{options.output}: complete already, nothing to do (--overwrite builds it anew)")
            return 0
        texts = _Texts(inputs, options, training, heldout)
        with Progress(total=None, label="documents") as progress:
            for (stream, document), ids in encode_in_order(texts, TokenizerSpec.of(tokenizer), options.workers):
                stream.feed(document, ids)
                if document % _SHOW_EVERY == 0:
                    progress.update(document + 1, {"tokens": f"{sum(s.num_tokens for s in streams):,}"})
        for stream in reversed(streams):  # the main manifest comes last
            stream.finish()
    _print_summary(streams, texts.num_empty, time.monotonic() - started)
    return 0


class _Stream:
    """One of the two outputs: a packer and the folder that it fills."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, inputs: list[str], options: argparse.Namespace
    ) -> None:
        wanted = Manifest(
            task=options.task,
            tokenizer=fingerprint(tokenizer),
            vocab_size=vocab_size(tokenizer),
            pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
            sequence_tokens=options.sequence_tokens,
            num_documents=0,
            shards=(),
            token_counts_sha256="",
            command=_command(options),
        )
        files = [(path, *_size_and_time(path)) for path in inputs if Path(path).is_file()]
        self._framing = framing_of(tokenizer, options.task)
        self.folder = folder
        self._folder = ShardFolder(folder, wanted, files, overwrite=options.overwrite)
        self._max_shard_bytes = options.shard_bytes
        start = Position(*self._folder.position) if self._folder.position else Position(0, 0, 0)
        self._packer = Packer(self._framing, options.sequence_tokens, start)
        self.num_tokens = 0
        """written by this process"""

    @property
    def is_complete(self) -> bool:
        return self._folder.manifest is not None

    @property
    def manifest(self) -> Manifest:
        assert self._folder.manifest is not None
        return self._folder.manifest

    def wants(self, document: int) -> bool:
        """Whether this document is not wholly in finished shards yet."""
        return not self.is_complete and document >= self._packer.position.document

    def feed(self, document: int, ids: np.ndarray) -> None:
        if len(ids):
            self._write(self._packer.add(document, ids))

    def finish(self) -> None:
        if self.is_complete:
            return
        self._write(self._packer.last())
        self._folder.cut(self._packer.position)
        if self._folder.num_shards == 0:
            raise DataError(f"no document for {self.folder}; give more input, or another --split-heldout")
        self._folder.finish(self._packer.position.num_documents)

    def __enter__(self) -> _Stream:
        self._folder.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.__exit__(*error)  # type: ignore[arg-type]

    def _write(self, sequences: Iterable[Packed]) -> None:
        for token_ids, document_tokens, position in sequences:
            self._folder.add(token_ids, document_tokens)
            self.num_tokens += len(token_ids)
            if self._folder.shard_bytes >= self._max_shard_bytes:
                self._folder.cut(position)


class _Texts:
    """The documents still to be tokenised, each with its number in the input and the stream that wants it."""

    def __init__(
        self, inputs: list[str], options: argparse.Namespace, training: _Stream, heldout: _Stream | None
    ) -> None:
        self.num_empty = 0
        self._inputs, self._options = inputs, options
        self._training, self._heldout = training, heldout

    def __iter__(self) -> Iterator[tuple[tuple[_Stream, int], str]]:
        document = 0
        options = self._options
        for source in self._inputs:
            for text in read_documents(source, text_column=options.text_column, one_per_line=options.one_per_line):
                stream = self._stream_of(text)
                if not text.strip():
                    self.num_empty += 1
                elif stream.wants(document):
                    yield (stream, document), text
                document += 1

    def _stream_of(self, text: str) -> _Stream:
        """By a hash of the text: the same for ever, and copies of a document fall on the same side."""
        if self._heldout is not None and fold("heldout", text) < self._options.split_heldout * 2**64:
            return self._heldout
        return self._training


def _command(options: argparse.Namespace) -> str:
    """The command without what does not change the result: where it is written, and by how many processes."""
    words = ["python", "data_tools/build_shards.py", "--task", options.task, "--input", *options.input]
    words += ["--tokenizer", options.tokenizer, "--sequence-tokens", str(options.sequence_tokens)]
    words += ["--shard-bytes", str(options.shard_bytes), "--split-heldout", repr(options.split_heldout)]
    words += ["--text-column", options.text_column, *(["--one-per-line"] if options.one_per_line else [])]
    return shlex.join(redact_words(words))


def _size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _refuse_newer(inputs: list[str], manifest: Path) -> None:
    for path in inputs:
        if Path(path).is_file() and _size_and_time(path)[1] > _size_and_time(str(manifest))[1]:
            raise DataError(f"{path} changed after {manifest} was made from it; --overwrite builds the shards anew")


def _print_summary(streams: list[_Stream], num_empty: int, seconds: float) -> None:
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
    parser.add_argument("--task", required=True, choices=("masked_lm", "causal_lm"))
    parser.add_argument("--input", required=True, nargs="+", help="files, globs, or data sets (name[:config]:split)")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--sequence-tokens", required=True, type=int, help="tokens of a sequence")
    parser.add_argument("--output", required=True, type=Path, help="folder for the shards")
    parser.add_argument("--split-heldout", type=_fraction, default=0.0, help="share of documents for OUTPUT/heldout")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="tokenizer processes")
    parser.add_argument("--shard-bytes", type=byte_count, default="256MB", help="size of a shard, as in 256MB or 1GiB")
    parser.add_argument("--one-per-line", action="store_true", help="each line of a text file is a document")
    parser.add_argument("--text-column", default="text", help="column of the text in tables, JSON and data sets")
    parser.add_argument("--overwrite", action="store_true", help="delete the shards that OUTPUT holds, and start anew")
    options = parser.parse_args(argv)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a share: expected 0 or more, less than 1")
    return value


if __name__ == "__main__":
    run_main(main)
