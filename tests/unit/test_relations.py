"""Attention maps and value relations: the closed form against autograd on plain maps in float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from engine.attention import noted_attention
from engine.errors import ConfigError
from engine.losses.relations import attention_of, relation_loss, relation_of
from engine.schema import Batch, LayerAttention

B, T = 3, 7
SEGMENTS = torch.tensor([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0], [0] * 7], dtype=torch.int32)


def batch() -> Batch:
    ids = torch.zeros(B, T, dtype=torch.long)
    rows = SEGMENTS.flatten().nonzero().flatten()
    return Batch(ids, ids, SEGMENTS, ids, rows, rows, True, ("a", "b", "c"))


def plain(
    kind: str, a: Tensor, b: Tensor, scale: float, ta: Tensor, tb: Tensor, t_scale: float, causal: bool
) -> Tensor:
    total = a.new_zeros(())
    for s in range(B):
        allowed = SEGMENTS[s][:, None] == SEGMENTS[s][None, :]
        if causal:
            allowed = allowed & torch.ones(T, T, dtype=torch.bool).tril()
        maps = []
        for x, y, factor in ((a, b, scale), (ta, tb, t_scale)):
            scores = (x[s] @ y[s].transpose(1, 2) * factor).masked_fill(~allowed, float("-inf"))
            maps.append(torch.softmax(scores, dim=-1))
        for head in range(a.shape[1]):
            for row in range(T):
                if SEGMENTS[s, row] == 0:
                    continue
                q, p = (each[head, row][allowed[row]] for each in maps)
                value = (p * (p.log() - q.log())).sum() if kind == "kl" else (p - q).square().mean()
                total = total + value / a.shape[1]
    return total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_value_and_gradients_are_those_of_plain_maps(kind: str, causal: bool) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(B, 2, T, 5, requires_grad=True) for _ in range(2))
    ta, tb = (torch.randn(B, 2, T, 4) for _ in range(2))
    value = relation_loss(kind, (a, b, 0.4), (ta, tb, 0.5), batch(), causal)
    (3.0 * value).backward()
    x, y = (each.detach().double().requires_grad_() for each in (a, b))
    expected = plain(kind, x, y, 0.4, ta.double(), tb.double(), 0.5, causal)
    (3.0 * expected).backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in ((a, x), (b, y)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_a_relation_of_values_with_themselves_trains_both_sides() -> None:
    torch.manual_seed(0)
    values = torch.randn(B, 4, T, 3, requires_grad=True)
    other = LayerAttention(torch.randn(B, 2, T, 8), torch.randn(B, 2, T, 8), torch.randn(B, 2, T, 8), 1.0, False)
    own = LayerAttention(values, values, values, 1.0, False)
    value = relation_loss("kl", relation_of(own, "value", 2), relation_of(other, "value", 2), batch(), False)
    value.backward()
    x = values.detach().double().requires_grad_()
    split = x.transpose(1, 2).reshape(B, T, 2, 6).transpose(1, 2)
    theirs = other.value.double()
    expected = plain("kl", split, split, 6**-0.5, theirs, theirs, 8**-0.5, False)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values.grad.double(), x.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def small(model_type: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    names = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32} if model_type == "gpt2" else settings
    if model_type == "llama":
        names = settings | {"num_key_value_heads": 2}
    if model_type == "distilbert":
        names = {"dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 32}
    config = transformers.AutoConfig.for_model(model_type, vocab_size=40, pad_token_id=0, **names)
    return transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra", "gpt2", "llama", "modernbert"])
def test_what_is_noted_makes_the_maps_that_the_model_gives(model_type: str) -> None:
    model = small(model_type)
    ids = torch.randint(5, 40, (2, 6))
    with noted_attention(model, (0, 2), "student") as noted:
        model(input_ids=ids)
    assert len(noted) == 2
    model.set_attn_implementation("eager")
    maps = model(input_ids=ids, output_attentions=True).attentions
    allowed = torch.ones(6, 6, dtype=torch.bool)
    for layer, index in zip(noted, (0, 2)):
        a, b, scale = attention_of(layer)
        if layer.causal:
            allowed = allowed.tril()
        scores = (a @ b.transpose(2, 3) * scale).masked_fill(~allowed, float("-inf"))
        torch.testing.assert_close(torch.softmax(scores, -1), maps[index], rtol=1e-4, atol=1e-5)


def test_models_whose_attention_cannot_be_seen_are_refused() -> None:
    model = small("bert")
    model.set_attn_implementation("eager")
    with (
        pytest.raises(ConfigError, match=r"need student\.attention: sdpa, found eager"),
        noted_attention(model, (0,), "student"),
    ):
        model(input_ids=torch.tensor([[5, 6]]))
