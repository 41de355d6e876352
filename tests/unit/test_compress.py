"""Students of another width or architecture: embeddings cut by singular values, BERT's weights in a DistilBERT."""

from __future__ import annotations

import pytest
import torch
import transformers

from engine.config.run import StudentSection
from engine.errors import ConfigError
from engine.student.build import build_student
from engine.student.compress import svd_embeddings
from engine.student.freezing import freeze_fixed_positions
from tests import architectures

IDS = torch.randint(5, 96, (2, 9), generator=torch.Generator().manual_seed(1))


def test_cut_embeddings_keep_what_a_singular_value_decomposition_keeps() -> None:
    teacher, student = architectures.model("bert"), architectures.model("bert", hidden_size=8)
    kept = svd_embeddings(student, teacher)
    table = teacher.get_input_embeddings().weight.detach().double()
    u, s, _ = torch.linalg.svd(table, full_matrices=False)
    assert kept == pytest.approx(float((s[:8] ** 2).sum() / (s**2).sum()))
    ours = student.get_input_embeddings().weight.detach().double()
    torch.testing.assert_close(ours @ ours.t(), (u[:, :8] * s[:8] ** 2) @ u[:, :8].t(), rtol=1e-4, atol=1e-4)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_cut_embeddings_are_the_same_every_time() -> None:
    teacher = architectures.model("bert")
    one, two = (architectures.model("bert", seed=seed, hidden_size=8) for seed in (1, 2))
    for student in (one, two):
        svd_embeddings(student, teacher)
    assert torch.equal(one.get_input_embeddings().weight, two.get_input_embeddings().weight)


def test_a_student_that_is_not_narrower_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be narrower"):
        svd_embeddings(architectures.model("bert", seed=1), architectures.model("bert"))


def test_a_config_with_cut_embeddings() -> None:
    config = architectures.config("bert", hidden_size=8, num_hidden_layers=1)
    section = StudentSection(config=config, init="svd_embeddings")
    built = build_student(section, "AutoModelForMaskedLM", 0, architectures.model("bert"))
    assert "%" in dict(built.origins)["word embeddings"]


def distilled(
    layers: tuple[int, ...], sinusoidal: bool = False, kind: str = "MaskedLM"
) -> transformers.PreTrainedModel:
    teacher = architectures.model("bert")
    if kind != "MaskedLM":
        torch.manual_seed(3)
        teacher = getattr(transformers, f"AutoModelFor{kind}").from_config(teacher.config).eval()
    section = StudentSection(
        init="teacher_layers", layers=layers, architecture="distilbert", sinusoidal_positions=sinusoidal
    )
    return build_student(section, f"AutoModelFor{kind}", 0, teacher).model.eval()


@pytest.mark.parametrize("kind", ["MaskedLM", "TokenClassification", "QuestionAnswering"])
def test_all_of_berts_layers_in_distilbert_compute_what_bert_does(kind: str) -> None:
    teacher = architectures.model("bert")
    if kind != "MaskedLM":
        torch.manual_seed(3)
        teacher = getattr(transformers, f"AutoModelFor{kind}").from_config(teacher.config).eval()
    student = distilled((0, 1, 2, 3), kind=kind)
    assert type(student).__name__ == f"DistilBertFor{kind}"
    for ours, theirs in zip(student(input_ids=IDS).to_tuple(), teacher(input_ids=IDS).to_tuple()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_chosen_layers_and_fixed_positions() -> None:
    teacher, student = architectures.model("bert"), distilled((1, 3), sinusoidal=True)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert torch.equal(
        ours["distilbert.transformer.layer.1.ffn.lin1.weight"], theirs["bert.encoder.layer.3.intermediate.dense.weight"]
    )
    positions = student.distilbert.embeddings.position_embeddings.weight
    freeze_fixed_positions(student)
    assert not positions.requires_grad
    assert not torch.equal(positions, theirs["bert.embeddings.position_embeddings.weight"])
    type_0 = theirs["bert.embeddings.token_type_embeddings.weight"][0]
    words = theirs["bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(ours["distilbert.embeddings.word_embeddings.weight"], words + type_0)


def test_only_a_bert_becomes_a_distilbert() -> None:
    section = StudentSection(init="teacher_layers", layers=2, architecture="distilbert")
    with pytest.raises(ConfigError, match="the teacher is a roberta"):
        build_student(section, "AutoModelForMaskedLM", 0, architectures.model("roberta"))
