"""Parts of models by name: what each holds, and what is refused."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ConfigError
from engine.student.freezing import freeze, parameters_of
from tests import architectures


def names(model_type: str, part: str) -> set[str]:
    model = architectures.model(model_type)
    chosen = {id(parameter) for parameter in parameters_of(model, part)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "gpt2", "llama", "modernbert", "electra"])
def test_embeddings_layers_and_head_are_all_there_is(model_type: str) -> None:
    model = architectures.model(model_type)
    parts = [names(model_type, part) for part in ("embeddings", "layers", "head")]
    assert set.union(*parts) == {name for name, _ in model.named_parameters()}
    assert sum(map(len, parts)) == len(set.union(*parts)), "no weight is in two parts"
    assert names(model_type, "encoder") == parts[0] | parts[1]
    last = model.config.num_hidden_layers - 1
    assert names(model_type, f"layers 0-{last}") == parts[1]
    assert names(model_type, "word_embeddings") <= parts[0]


def test_bert_by_name() -> None:
    assert names("bert", "position_embeddings") == {"bert.embeddings.position_embeddings.weight"}
    assert "bert.embeddings.LayerNorm.weight" in names("bert", "embeddings")
    assert all(".layer.1." in name for name in names("bert", "layers 1"))
    assert all(name.startswith("cls.") for name in names("bert", "head"))
    assert names("gpt2", "head") == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_frozen_weights_take_no_gradient_and_others_do() -> None:
    model = architectures.model("bert")
    count = freeze(model, ["embeddings", "layers 0"])
    assert count == sum(p.numel() for part in ("embeddings", "layers 0") for p in parameters_of(model, part))
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("bert.embeddings", "bert.encoder.layer.0."))
        assert (parameter.grad is None) == frozen, name


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("layers 9", "layers 9: the student's layers are 0 to"),
        ("layers 2-1", "layers 2-1"),
        ("pooler", "there is no part 'pooler'"),
        ("token_type_embeddings", "has no 'token_type_embeddings'"),
    ],
)
def test_parts_that_are_not_there(part: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        freeze(architectures.model("gpt2" if part.startswith("token") else "bert"), [part])
