"""BERT's weights in DistilBERT's architecture: the same layers without token types and without a pooler.

DistilBERT (Sanh et al., arXiv 1910.01108) leaves BERT's embedding of the token type away. A single text has type 0
everywhere, so that row is added to the positions here, and a student with all of BERT's layers computes what BERT does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DistilBertConfig, PreTrainedConfig

from engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BASE = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.LayerNorm": "embeddings.LayerNorm",
}
_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
_HEADS = {
    "vocab_transform": "cls.predictions.transform.dense",
    "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
    "vocab_projector": "cls.predictions",
    "pre_classifier": "bert.pooler.dense",
    "classifier": "classifier",
    "qa_outputs": "qa_outputs",
}
_STACK = "distilbert.transformer.layer."


def distilbert_config(teacher: PreTrainedConfig, num_layers: int, sinusoidal_positions: bool) -> DistilBertConfig:
    """Of a student with ``num_layers`` of the teacher's layers. Raises ConfigError for a teacher that is no BERT."""
    if teacher.model_type != "bert":
        raise ConfigError(
            f"student.architecture: distilbert is made of a BERT, and the teacher is a {teacher.model_type}; leave "
            "architecture out to keep the teacher's"
        )
    return DistilBertConfig(
        vocab_size=teacher.vocab_size,
        max_position_embeddings=teacher.max_position_embeddings,
        sinusoidal_pos_embds=sinusoidal_positions,
        n_layers=num_layers,
        n_heads=teacher.num_attention_heads,
        dim=teacher.hidden_size,
        hidden_dim=teacher.intermediate_size,
        dropout=teacher.hidden_dropout_prob,
        attention_dropout=teacher.attention_probs_dropout_prob,
        activation=teacher.hidden_act,
        initializer_range=teacher.initializer_range,
        pad_token_id=teacher.pad_token_id,
        tie_word_embeddings=teacher.tie_word_embeddings,
    )


def name_in_bert(name: str, layers: tuple[int, ...]) -> str | None:
    """Which weight of a BERT becomes the student's weight ``name``; None where none does."""
    part, _, ending = name.rpartition(".")
    if part.startswith(_STACK):
        number, _, inner = part.removeprefix(_STACK).partition(".")
        return f"bert.encoder.layer.{layers[int(number)]}.{_LAYER[inner]}.{ending}" if inner in _LAYER else None
    inner = part.removeprefix("distilbert.")
    if inner in _BASE:
        return f"bert.{_BASE[inner]}.{ending}"
    if inner == "vocab_projector" and ending == "weight":
        return "cls.predictions.decoder.weight"
    return f"{_HEADS[inner]}.{ending}" if inner in _HEADS else None


@torch.no_grad()
def fold_token_type(student: PreTrainedModel, teacher_weights: dict[str, Tensor]) -> None:
    """Add the embedding of token type 0 to the positions, or to the words where positions are sinusoids."""
    first_type = teacher_weights["bert.embeddings.token_type_embeddings.weight"][0]
    table = "word_embeddings" if student.config.sinusoidal_pos_embds else "position_embeddings"
    student.get_submodule(f"distilbert.embeddings.{table}").weight += first_type  # type: ignore[operator]
