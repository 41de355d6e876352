"""Small sets of shards, and what it takes to build some from text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine.data.manifest import Manifest, ShardEntry, write_manifest
from engine.data.record import token_dtype
from engine.data.shard_writer import ShardWriter
from engine.data.shards import ShardSet

VOCAB = 300
SEQUENCE = 32
WORDS = [f"word{number}" for number in range(40)]


def samples_of(shard: int, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(shard)
    samples = []
    for number in range(count):
        documents = rng.integers(1, 12, size=rng.integers(1, 3)).astype(np.uint32)
        ids = rng.integers(0, VOCAB, size=int(documents.sum())).astype(np.uint32)
        samples.append((f"{shard:06d}-{number:08d}", ids, documents))
    return samples


def write_shard(path: Path, samples: list[tuple[str, np.ndarray, np.ndarray]]) -> ShardEntry:
    with ShardWriter(path, token_dtype(VOCAB)) as writer:
        for sample in samples:
            writer.add(*sample)
    assert writer.entry is not None
    return writer.entry


def write_set(folder: Path, counts: tuple[int, ...] = (7, 5)) -> Path:
    entries = [write_shard(folder / f"shard-{i:06d}.tar", samples_of(i, count)) for i, count in enumerate(counts)]
    return manifest_of(folder, entries)


def manifest_of(folder: Path, entries: list[ShardEntry], vocab_size: int = VOCAB) -> Path:
    counts = np.zeros(vocab_size, np.int64)
    manifest = Manifest(
        task="causal_lm", tokenizer="f", vocab_size=vocab_size, pad_id=0, sequence_tokens=SEQUENCE, num_documents=1,
        shards=tuple(entries), token_counts_sha256="", command="test",
    )  # fmt: skip
    write_manifest(folder, manifest, counts)
    return folder / "manifest.json"


def rewritten(manifest: Path, change: dict[str, object]) -> Path:
    """The manifest with the first shard's entry changed."""
    content = json.loads(manifest.read_text())
    content["shards"][0].update(change)
    manifest.write_text(json.dumps(content))
    return manifest


def save_tokenizer(folder: Path, *, masked: bool) -> Path:
    """One token a word: an encoder's tokenizer with [CLS] and [SEP], or a decoder's with an end-of-text token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if masked else ["<unk>", "<eos>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token=special[masked]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if masked:
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["mask_token"] = "[MASK]"
    else:
        names = {"unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return folder


def some_documents(count: int, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, longest))) for _ in range(count)]


def write_text(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def arguments(source: object, tokenizer: Path, output: Path, *more: str, task: str = "causal_lm") -> list[str]:
    fixed = ["--tokenizer", str(tokenizer), "--sequence-tokens", "32", "--output", str(output), "--workers", "1"]
    return ["--task", task, "--input", str(source), *fixed, *more]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shards_of(folder: Path) -> dict[str, bytes]:
    """Without the manifest, which holds the command."""
    return {name: content for name, content in files_of(folder).items() if "manifest" not in name}


def pieces_of(folder: Path) -> list[list[int]]:
    """The pieces of documents in all samples, in order."""
    shards = ShardSet.open(str(folder / "manifest.json"))
    pieces = []
    for shard, count in enumerate(shards.manifest.samples_per_shard):
        for index in range(count):
            sample = shards.read(shard, index)
            pieces += [p.tolist() for p in np.split(sample.token_ids, np.cumsum(sample.document_tokens)[:-1])]
    return pieces


def flip_a_bit(shard: Path, sample: int = 20) -> None:
    """In a token of a sample: no header tells of it, the checksum of the record does."""
    offset, num_bytes, *_ = np.load(shard.with_suffix(".index.npy"))[sample]
    content = bytearray(shard.read_bytes())
    content[offset + num_bytes - 512 + 128 + 3] ^= 0x10
    shard.write_bytes(content)
