"""Tiny models of the architectures that the project promises: what sets each apart, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from tests.tiny import SMALL

DECODER = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
DISTILBERT = {"vocab_size": 96, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64,
              "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64,
        "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL | {"max_position_embeddings": 66},
    "modernbert": SMALL | {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 16,
                           "global_attn_every_n_layers": 3},
    "distilbert": DISTILBERT,
    "electra": SMALL | {"embedding_size": 16},
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": DECODER,
    "qwen3": DECODER | {"layer_types": ["full_attention"] * 4},
    "gemma2": DECODER | {"sliding_window": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": DECODER | {"sliding_window": 16, "final_logit_softcapping": 3.0},
    "granite": DECODER | {"logits_scaling": 4.0},
    "cohere": DECODER | {"logit_scale": 0.25},
}
NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embd_pdrop",
              "attn_pdrop", "resid_pdrop", "embedding_dropout", "mlp_dropout")  # fmt: skip


def task_of(model_type: str) -> str:
    return "masked_lm" if model_type in ENCODERS else "causal_lm"


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of the transformers config, with all dropout off."""
    settings = (ENCODERS | DECODERS)[model_type] | changes
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    return {"model_type": model_type} | {name: 0.0 for name in NO_DROPOUT if name in known} | settings


def model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Weights and biases large enough that every part of the model matters."""
    made = transformers.AutoConfig.for_model(**config(model_type, **changes))
    auto = transformers.AutoModelForMaskedLM if model_type in ENCODERS else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    built = auto.from_config(made)
    for name, parameter in built.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return built.eval()
