"""Tiny but real things for tests: a tokenizer, text, shards, models. Generated, nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from engine.data.manifest import Manifest, write_manifest
from engine.data.record import token_dtype
from engine.data.shard_writer import ShardWriter
from engine.tasks.tokenizer import fingerprint

NUM_WORDS = 91
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer() -> PreTrainedTokenizerFast:
    """96 ids: five special ones and words w0 to w90."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *(f"w{i}" for i in range(NUM_WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )


def shards(
    folder: Path, task: str, *, num_samples: int = 96, sequence_tokens: int = 32, seed: int = 0, packed: bool = True
) -> Path:
    """Three shards of documents in which each word depends on the one before, packed or one a sequence. Returns the
    manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    vocabulary = tokenizer()
    counts = np.zeros(len(vocabulary), np.int64)
    entries = []
    for number, size in enumerate(np.diff([0, num_samples // 2, num_samples - num_samples // 8, num_samples])):
        with ShardWriter(folder / f"shard-{number:06d}.tar", token_dtype(len(vocabulary))) as writer:
            for n in range(size):
                ids, lengths = _sequence(rng, sequence_tokens)
                ids, lengths = (ids, lengths) if packed else (ids[: lengths[0]], lengths[:1])
                counts += np.bincount(ids, minlength=len(counts))
                writer.add(f"{number:06d}-{n:08d}", ids, lengths)
        assert writer.entry is not None
        entries.append(writer.entry)
    manifest = Manifest(
        task=task,
        tokenizer=fingerprint(vocabulary),
        vocab_size=len(vocabulary),
        pad_id=0,
        sequence_tokens=sequence_tokens,
        num_documents=3 * num_samples,
        shards=tuple(entries),
        token_counts_sha256=hashlib.sha256(b"").hexdigest(),
        command="tests",
    )
    write_manifest(folder, manifest, counts)
    return folder / "manifest.json"


def _sequence(rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Two documents: [CLS] words [SEP] each; word n+1 is one of three that follow from word n."""
    cut = int(rng.integers(8, tokens - 8))
    ids: list[int] = []
    for length in (cut, tokens - cut):
        word = int(rng.integers(NUM_WORDS))
        ids.append(2)
        for _ in range(length - 2):
            ids.append(len(SPECIAL) + word)
            word = (3 * word + int(rng.integers(3))) % NUM_WORDS
        ids.append(3)
    return np.array(ids), np.array([cut, tokens - cut])


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
LLAMA = SMALL | {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.1}
BERT = SMALL | {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                "initializer_range": 0.1}  # fmt: skip
CONFIGS = {"causal_lm": LLAMA, "masked_lm": BERT}
CLASSES: dict[str, Callable[..., PreTrainedModel]] = {
    "causal_lm": transformers.AutoModelForCausalLM.from_config,
    "masked_lm": transformers.AutoModelForMaskedLM.from_config,
}


def model(task: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    config = transformers.AutoConfig.for_model(**(CONFIGS[task] | changes))
    torch.manual_seed(seed)
    return CLASSES[task](config)


def model_folder(folder: Path, task: str, seed: int = 0, **changes: Any) -> Path:
    model(task, seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run_config(root: Path, task: str = "causal_lm", **sections: Any) -> dict[str, Any]:
    """A run over ``root``/train with the teacher in ``root``/teacher; both are made when they are not there."""
    if not (root / "teacher").exists():
        model_folder(root / "teacher", task)
        shards(root / "train", task)
        shards(root / "heldout", task, num_samples=24, seed=1)
    config: dict[str, Any] = {
        "run": {"name": "run", "output": str(root / "runs"), "seed": 3, "num_steps": 8, "precision": "fp32"},
        "task": {"kind": task},
        "student": {"init": "teacher_layers", "layers": 2},
        "teacher": {"kind": "online", "model": str(root / "teacher")},
        "data": {"manifest": str(root / "train" / "manifest.json"), "lanes": 4, "shuffle_samples": 8},
        "batch": {"global_sequences": 8, "micro_sequences": 2},
        "losses": [{"kind": "forward_kl", "weight": 0.5, "temperature": 2.0}, {"kind": "cross_entropy", "weight": 0.5}],
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"every_steps": 3},
        "tracking": {"every_steps": 1},
    }
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values if isinstance(values, dict) else values
    return config
