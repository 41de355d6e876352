"""What the demo trains: the runs of teacher, control and student for each task.

Control and student are one model: the same fresh weights from one seed, the same batches, steps and learning rate.
Only the objective differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY_IDS = 4096
SEQUENCE_TOKENS = 128
HELDOUT_SHARE = 0.05
STAGES = ("teacher", "control", "student")

_MODELS: dict[str, dict[str, Any]] = {
    "causal_lm": {
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "masked_lm": {
        # rotary positions and norms before the layers: BERT's own layout needs many more steps before it learns
        "model_type": "modernbert",
        "hidden_size": 192,
        "intermediate_size": 288,
        "num_attention_heads": 6,
        "global_attn_every_n_layers": 1,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "bos_token_id": 1,
        "sep_token_id": 2,
        "eos_token_id": 2,
    },
}
_NUM_LAYERS = {"teacher": 4, "control": 2, "student": 2}
_NUM_STEPS = {
    "causal_lm": {"teacher": 600, "control": 300, "student": 300},
    "masked_lm": {"teacher": 700, "control": 400, "student": 400},
}
_LOSSES: dict[str, list[dict[str, Any]]] = {
    "teacher": [{"kind": "cross_entropy"}],
    "control": [{"kind": "cross_entropy"}],
    "student": [{"kind": "forward_kl", "weight": 0.9}, {"kind": "cross_entropy", "weight": 0.1}],
}


CACHE = "targets"
_MASK_ROUNDS = 2
"""Of a student that learns from a cache, and of its control: each round is asked for."""


def recipe(stage: str, task: str, folder: Path, zero: Path, cached: bool = False) -> dict[str, Any]:
    """The run YAML of ``stage``, which writes to ``folder``/``stage`` and reads what earlier stages left beside it.

    ``cached``: the student's teacher is asked once, before.
    """
    config: dict[str, Any] = {
        "run": {"name": stage, "output": str(folder), "seed": 17, "num_steps": _NUM_STEPS[task][stage]},
        "task": {"kind": task, "tokenizer": str(folder / "tokenizer")},
        "student": {
            "config": _MODELS[task]
            | {
                "num_hidden_layers": _NUM_LAYERS[stage],
                "vocab_size": VOCABULARY_IDS,
                "max_position_embeddings": SEQUENCE_TOKENS,
            }
        },
        "data": {"manifest": str(folder / "shards" / "manifest.json"), "lanes": 16},
        "batch": {"global_sequences": 16, "micro_sequences": 8},
        "losses": _LOSSES[stage],
        "optimizer": {"learning_rate": 2.0e-3, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup_steps": min(30, _NUM_STEPS[task][stage] // 10)},
        "evaluation": {"manifest": str(folder / "shards" / "heldout" / "manifest.json"), "every_steps": 200},
        "checkpoint": {"every_steps": 200},
        "zero": str(zero),
    }
    if task == "masked_lm":
        config["task"]["mask_fraction"] = 0.3  # twice the usual: a short run needs the labels
        if cached and stage != "teacher":
            config["task"]["mask_rounds"] = _MASK_ROUNDS
    if stage == "student":
        config["teacher"] = {"kind": "online", "model": str(folder / "teacher" / "export")}
        if cached:
            config["teacher"] |= {"kind": "cached", "cache": CACHE}
        config["evaluation"]["control"] = str(folder / "control" / "export")
    return config
