"""Tell what a set of shards holds: its settings, how long its documents are, a few of its samples.

python data_tools/describe_shards.py shards/manifest.json --tokenizer bert-base-uncased
"""

from __future__ import annotations

import argparse
import textwrap

import numpy as np

from data_tools.sizes import show_bytes
from engine.data.manifest import Manifest
from engine.data.shards import ShardSet
from engine.data.spread import spread
from engine.errors import ConfigError
from engine.log import run_main
from engine.schema import Sample
from engine.tasks.tokenizer import fingerprint, load_tokenizer

COLUMNS = 80
SURVEYED_SAMPLES = 2000
SHOWN_CHARACTERS = 320


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tell what a set of shards holds.")
    parser.add_argument("manifest", help="path or address of manifest.json")
    parser.add_argument("--tokenizer", help="folder or hub id; shows samples as text instead of ids")
    parser.add_argument("--samples", type=int, default=3, help="how many samples to show")
    parser.add_argument("--allow-pipe", action="store_true", help="run the pipe: commands that the manifest names")
    options = parser.parse_args(argv)
    shards = ShardSet.open(options.manifest, allow_pipe=options.allow_pipe)
    print("\n".join(_settings(shards.manifest)))
    print("\n" + "\n".join(_histogram(shards)))
    for sample in _samples(shards, options.samples):
        print(f"\n{sample.name}: {len(sample.token_ids)} tokens, documents of {_listed(sample.document_tokens)}")
        print(_shown(sample, shards.manifest, options.tokenizer))
    return 0


def _settings(manifest: Manifest) -> list[str]:
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    filled = manifest.num_tokens / max(1, manifest.num_samples * manifest.sequence_tokens)
    rows = {
        "task": manifest.task,
        "sequences": f"{manifest.num_samples:,} of at most {manifest.sequence_tokens} tokens, {filled:.1%} filled",
        "tokens": f"{manifest.num_tokens:,}",
        "documents": f"{manifest.num_documents:,}",
        "shards": f"{len(manifest.shards):,}, {show_bytes(num_bytes)} in all",
        "vocabulary": f"{manifest.vocab_size:,} ids, padding {manifest.pad_id}",
        "tokenizer": manifest.tokenizer,
        "made by": manifest.command,
    }
    lines = []
    for name, value in rows.items():
        lines += textwrap.wrap(f"{name:<11} {value}", COLUMNS, subsequent_indent=" " * 12)
    return lines


def _histogram(shards: ShardSet) -> list[str]:
    """Bars over powers of two. A document cut between two sequences counts as its pieces."""
    samples = _samples(shards, SURVEYED_SAMPLES)
    lengths = np.concatenate([sample.document_tokens for sample in samples]) if samples else np.zeros(0, np.int64)
    if not len(lengths):
        return ["no samples"]
    octaves = np.bincount(np.floor(np.log2(lengths)).astype(np.int64))
    widest = COLUMNS - len("12345-12345  123,456  ")
    lines = [f"tokens of a document, in {len(samples):,} of {shards.manifest.num_samples:,} sequences"]
    for octave, count in enumerate(octaves.tolist()):
        label = f"{2**octave}-{2 ** (octave + 1) - 1}"
        lines.append(f"{label:>11}  {count:>7,}  {'#' * -(-widest * count // int(octaves.max()))}".rstrip())
    return lines


def _samples(shards: ShardSet, count: int) -> list[Sample]:
    """At most ``count``, evenly over the whole data set."""
    return [shards.read(*place) for place in spread(shards.manifest.samples_per_shard, count)]


def _listed(lengths: np.ndarray) -> str:
    shown = ", ".join(str(length) for length in lengths[:8])
    return shown + (f" and {len(lengths) - 8} more" if len(lengths) > 8 else "")


def _shown(sample: Sample, manifest: Manifest, tokenizer_name: str | None) -> str:
    if tokenizer_name is None:
        text = " ".join(str(token) for token in sample.token_ids[:100])
    else:
        tokenizer = load_tokenizer(tokenizer_name)
        if fingerprint(tokenizer) != manifest.tokenizer:
            raise ConfigError(
                f"--tokenizer {tokenizer_name}: its fingerprint is {fingerprint(tokenizer)}, the shards' is "
                f"{manifest.tokenizer}; give the tokenizer that the shards were made with"
            )
        text = str(tokenizer.decode(sample.token_ids.tolist()))
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
    return textwrap.fill(text, COLUMNS, initial_indent="  ", subsequent_indent="  ")


if __name__ == "__main__":
    run_main(main)
