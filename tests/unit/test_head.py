"""The fused head is the model's own, for every architecture promised, and a model that is not so is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.losses.head import HeadTap, check_head, describe_head, head_logits
from tests import architectures
from tests.architectures import DECODERS, ENCODERS

INPUTS = {"input_ids": torch.arange(5, 21).reshape(2, 8)}
NAMES = [*ENCODERS, *DECODERS]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", NAMES)
def test_tapped_states_and_head_give_the_models_own_logits(model_type: str, tied: bool) -> None:
    model = architectures.model(model_type, tie_word_embeddings=tied)
    embeddings = model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is embeddings) == tied
    with torch.no_grad():
        own = model(**INPUTS).logits
        tap = HeadTap(model)
        output = model(**INPUTS)
    assert output.logits.shape[-1] != 96, "the logits were formed after all"
    head = describe_head(tap.module, model.config)
    state = tap.take()
    ours = head_logits(state.flatten(0, 1), head, 96)
    torch.testing.assert_close(ours, own.flatten(0, 1), rtol=1e-5, atol=1e-5)
    check_head(model, tap, INPUTS, 96, model_type)
    tap.remove()
    with torch.no_grad():
        assert torch.equal(model(**INPUTS).logits, own)


@pytest.mark.parametrize("model_type", NAMES)
def test_a_bias_is_found_where_the_architecture_has_one(model_type: str) -> None:
    model = architectures.model(model_type)
    bias = describe_head(model.get_output_embeddings(), model.config).bias
    assert (bias is not None) == (model_type in ENCODERS)
    if bias is not None:
        assert bias.abs().sum() > 0.0


@pytest.mark.parametrize(
    ("model_type", "setting", "neutral"),
    [
        ("gemma2", "final_logit_softcapping", None),
        ("gemma3_text", "final_logit_softcapping", None),
        ("granite", "logits_scaling", 1.0),
        ("cohere", "logit_scale", 1.0),
    ],
)
def test_what_a_model_does_to_its_logits_matters_here(model_type: str, setting: str, neutral: Any) -> None:
    """The tests above would pass for a forgotten setting if it changed nothing in these small models."""
    model = architectures.model(model_type)
    with torch.no_grad():
        own = model(**INPUTS).logits
        tap = HeadTap(model)
        model(**INPUTS)
    state = tap.take().flatten(0, 1)
    setattr(model.config, setting, neutral)
    without = head_logits(state, describe_head(tap.module, model.config), 96)
    assert (without - own.flatten(0, 1)).abs().max() > 0.1


class Doctored(nn.Module):
    """Multiplies its logits by a setting of its own name."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor, self.config = model, factor, model.config
        self.config.output_multiplier = factor

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize("factor", [0.5, 1.01])
def test_an_unknown_change_of_the_logits_is_refused_with_its_setting(factor: float) -> None:
    model = Doctored(architectures.model("llama"), factor)
    with pytest.raises(ConfigError, match=r"student \(Doctored\): its own logits differ by .*output_multiplier"):
        check_head(model, HeadTap(model), INPUTS, 96, "student")


def test_weights_that_are_not_finite_are_told_as_such() -> None:
    model = architectures.model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"teacher \(LlamaForCausalLM\): its logits are NaN or Inf"):
        check_head(model, HeadTap(model), INPUTS, 96, "teacher")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_pass_the_check(dtype: torch.dtype) -> None:
    for model_type in ("bert", "llama", "gemma2"):
        model = architectures.model(model_type).to(dtype)
        check_head(model, HeadTap(model), INPUTS, 96, model_type)


def test_the_check_leaves_the_model_in_the_mode_it_found() -> None:
    model = architectures.model("bert").train()
    check_head(model, HeadTap(model), INPUTS, 96, "student")
    assert model.training
    assert all(module.training for module in model.modules())


def test_a_model_without_a_vocabulary_head_is_refused() -> None:
    class NoHead(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    for model in (NoHead(), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="has no output embeddings"):
            HeadTap(model)


def test_a_state_is_taken_once() -> None:
    model = architectures.model("llama")
    tap = HeadTap(model)
    model(**INPUTS)
    first: Tensor = tap.take()
    assert first.shape == (2, 8, 32)
    with pytest.raises(AssertionError, match="did not reach its head"):
        tap.take()


def test_padded_rows_of_the_head_are_left_out() -> None:
    model = architectures.model("llama", vocab_size=128)
    check_head(model, HeadTap(model), INPUTS, 96, "student")
    head = describe_head(model.get_output_embeddings(), model.config)
    assert head_logits(torch.zeros(3, 32), head, 96).shape == (3, 96)
