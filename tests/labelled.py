"""Tiny labelled data with a tiny model of each task: what a word's label is follows from the word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from data_tools import build_shards
from tests.sharding import WORDS, save_tokenizer

LABELS = ("O", "B-A", "I-A", "B-B", "I-B")
BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "vocab_size": 45, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CLASSES = {
    "token_classification": transformers.AutoModelForTokenClassification,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
}
NAMES = {"token_classification": LABELS, "sequence_classification": ("no", "yes"), "question_answering": None}


def sentences(count: int, seed: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(WORDS, size=rng.integers(3, 14)).tolist() for _ in range(count)]


def tags(words: list[str]) -> list[str]:
    """Every fifth word is an A, every seventh begins a B that goes on over the next word."""
    found = ["O"] * len(words)
    for place, word in enumerate(words):
        number = int(word.removeprefix("word"))
        if number % 7 == 0:
            found[place] = "B-B"
            if place + 1 < len(words):
                found[place + 1] = "I-B"
        elif number % 5 == 0 and found[place] == "O":
            found[place] = "B-A"
    return found


def write_data(path: Path, task: str, count: int, seed: int, labelled: bool = True) -> Path:
    texts = sentences(count, seed)
    if task == "token_classification":
        lines = [" ".join(words) + ("\t" + " ".join(tags(words)) if labelled else "") for words in texts]
        path = path.with_suffix(".tsv")
        path.write_text("\n".join(lines) + "\n")
    elif task == "sequence_classification":
        path = path.with_suffix(".jsonl")
        rows = [{"text": " ".join(w), "label": "yes" if int(w[0].removeprefix("word")) % 2 else "no"} for w in texts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path = path.with_suffix(".json")
        paragraphs = [_paragraph(number, words) for number, words in enumerate(texts)]
        path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def _paragraph(number: int, words: list[str]) -> dict[str, Any]:
    """The question is a word of the context, and so is the answer."""
    place = number % len(words)
    context, asked = " ".join(words), words[place]
    answer = {"text": asked, "answer_start": len(" ".join([*words[:place], ""]))}
    return {"context": context, "qas": [{"id": f"q{number}", "question": asked, "answers": [answer]}]}


def shards(root: Path, task: str, name: str, count: int, seed: int, labelled: bool = True) -> Path:
    path = write_data(root / name, task, count, seed, labelled)
    more = ["--overlap-tokens", "4", "--question-tokens", "2"] if task == "question_answering" else []
    if task == "token_classification":
        (root / "labels.tsv").write_text("\n".join(LABELS))
    words = ["--task", task, "--input", str(path), "--tokenizer", str(root / "tokenizer"), "--sequence-tokens", "32",
             "--output", str(root / "shards" / name), "--workers", "1", *more]  # fmt: skip
    assert build_shards.main(words) == 0
    return root / "shards" / name / "manifest.json"


def model_folder(folder: Path, task: str, seed: int = 0, **changes: Any) -> Path:
    config = transformers.AutoConfig.for_model(**(BERT | changes))
    if (names := NAMES[task]) is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
    torch.manual_seed(seed)
    CLASSES[task].from_config(config).save_pretrained(folder)
    save_tokenizer(folder, masked=True)
    return folder


def run_config(root: Path, task: str, **sections: Any) -> dict[str, Any]:
    """A run over ``root``, whose data and teacher are made when they are not there."""
    if not (root / "teacher").exists():
        save_tokenizer(root / "tokenizer", masked=True)
        model_folder(root / "teacher", task)
        shards(root, task, "train", 96, seed=0)
        shards(root, task, "dev", 21, seed=1)
    config: dict[str, Any] = {
        "run": {"name": "run", "output": str(root / "runs"), "seed": 3, "num_steps": 8, "precision": "fp32"},
        "task": {"kind": task, "tokenizer": str(root / "tokenizer")},
        "student": {"config": BERT | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}},
        "teacher": {"kind": "online", "model": str(root / "teacher")},
        "data": {"manifest": str(root / "shards" / "train" / "manifest.json"), "lanes": 4, "shuffle_samples": 16},
        "batch": {"global_sequences": 8, "micro_sequences": 4},
        "losses": [{"kind": "forward_kl", "temperature": 2.0}, {"kind": "cross_entropy", "weight": 0.5}],
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"every_steps": 3},
        "tracking": {"every_steps": 1},
    }
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values if isinstance(values, dict) else values
    return config
