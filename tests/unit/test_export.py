"""The exported folder is the trained student, to everybody who opens it with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from engine import export
from engine.errors import CheckpointError
from engine.export import export_student, model_card, student_from_state
from tests import architectures, tiny
from tests.architectures import DECODERS, ENCODERS

INPUTS = {"input_ids": torch.arange(5, 21).reshape(2, 8)}


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """As it lies in the module that is trained, beside projections of the objective."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return state | {"objective.projections.0_0.weight": torch.zeros(3, 3)}


def config_folder(model: PreTrainedModel, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", [*ENCODERS, *DECODERS])
def test_an_export_gives_the_logits_of_the_trained_student(tmp_path: Path, model_type: str, tied: bool) -> None:
    trained = architectures.model(model_type, tie_word_embeddings=tied)
    task = architectures.task_of(model_type)
    student = student_from_state(state_of(trained), config_folder(trained, tmp_path / "config"), task)
    folder = export_student(student, task, tiny.tokenizer(), tmp_path / "export", "# card")
    auto = transformers.AutoModelForMaskedLM if task == "masked_lm" else transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**INPUTS).logits, trained(**INPUTS).logits)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again.get_vocab() == tiny.tokenizer().get_vocab()
    assert (folder / "README.md").read_text() == "# card"
    assert list(folder.glob("*.safetensors"))
    assert not list(folder.glob("*.bin"))


@pytest.mark.parametrize(("task", "pipe"), [("masked_lm", "fill-mask"), ("causal_lm", "text-generation")])
def test_an_export_answers_in_a_pipeline(tmp_path: Path, task: str, pipe: str) -> None:
    export_student(tiny.model(task).eval(), task, tiny.tokenizer(), tmp_path, "")
    answer: Any = transformers.pipeline(pipe, model=str(tmp_path))("w1 w2 [MASK]" if pipe == "fill-mask" else "w1 w2")
    assert answer


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_an_export_in_half_precision_says_so(tmp_path: Path, dtype: str, wanted: torch.dtype) -> None:
    folder = export_student(tiny.model("causal_lm").eval(), "causal_lm", tiny.tokenizer(), tmp_path, "", dtype)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == wanted


def test_an_export_that_reads_back_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        @staticmethod
        def from_pretrained(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
            return tiny.model("causal_lm", seed=99)

    monkeypatch.setitem(export.AUTO_CLASSES, "causal_lm", Other)
    with pytest.raises(CheckpointError, match="read back, the exported model gives other logits"):
        export_student(tiny.model("causal_lm").eval(), "causal_lm", tiny.tokenizer(), tmp_path, "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.model.norm.weight"), r"1 missing \['model.norm.weight'\], 0 unknown"),
        (lambda state: state.update({"model.extra": torch.zeros(1)}), r"0 missing \[\], 1 unknown \['extra'\]"),
    ],
)
def test_weights_that_are_not_the_configs_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    trained = tiny.model("causal_lm")
    state = state_of(trained)
    change(state)
    with pytest.raises(CheckpointError, match=words):
        student_from_state(state, config_folder(trained, tmp_path), "causal_lm")


def test_the_card_names_the_teacher_the_terms_and_the_figures() -> None:
    card = model_card("demo", "masked_lm", "teachers/big", ["forward_kl: weight 1.0"], {"perplexity": "5.00"})
    for words in ("# demo", "distilled from `teachers/big`", "- forward_kl: weight 1.0", "| perplexity | 5.00 |",
                  "pipeline_tag: fill-mask"):  # fmt: skip
        assert words in card
    assert "trained on labels alone" in model_card("demo", "causal_lm", None, [], {})
