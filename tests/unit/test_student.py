"""The student's weights: from the teacher's layers, a config, a folder; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from engine.config.run import StudentSection, TeacherSection
from engine.errors import ConfigError
from engine.models import layer_stack, load_model
from engine.student.build import BuiltStudent, build_student, chosen_layers, copy_layers, student_config
from tests import architectures, tiny
from tests.architectures import DECODERS, ENCODERS

NAMES = [*ENCODERS, *DECODERS]


def auto_class(model_type: str) -> str:
    return "AutoModelForMaskedLM" if model_type in ENCODERS else "AutoModelForCausalLM"


def from_layers(teacher: PreTrainedModel, layers: Any, model_type: str, seed: int = 0) -> BuiltStudent:
    section = StudentSection(init="teacher_layers", layers=layers)
    return build_student(section, auto_class(model_type), seed, teacher)


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        (6, 12, (0, 2, 4, 7, 9, 11)),
        (3, 12, (0, 6, 11)),
        (1, 12, (0,)),
        (12, 12, tuple(range(12))),
        (2, 4, (0, 3)),
        ((3, 1), 4, (3, 1)),
    ],
)
def test_a_count_is_spread_from_the_first_to_the_last(layers: Any, num_layers: int, expected: tuple[int, ...]) -> None:
    assert chosen_layers(layers, num_layers) == expected


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (5, "student.layers: 5 layers asked of a teacher that has 4"),
        ((0, 4), "student.layers: the teacher has no layer 4; its layers are 0 to 3"),
        ((-1,), "student.layers: the teacher has no layer -1"),
    ],
)
def test_layers_that_the_teacher_has_not(layers: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chosen_layers(layers, 4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", NAMES)
def test_every_weight_is_the_teachers(model_type: str, tied: bool) -> None:
    """Layers 0 and 3 of four, embeddings and head; tied stays tied, and the student runs."""
    teacher = architectures.model(model_type, tie_word_embeddings=tied)
    built = from_layers(teacher, (0, 3), model_type)
    student, stack = built.model, layer_stack(teacher, 4, "teacher")
    assert layer_stack(student, 2, "student") == stack
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        wanted = name.replace(f"{stack}.1.", f"{stack}.3.")
        assert torch.equal(tensor, theirs[wanted]), name
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    origins = dict(built.origins)
    assert origins[f"{stack}.0"] == f"teacher {stack}.0"
    assert origins[f"{stack}.1"] == f"teacher {stack}.3"
    assert not any(origin.startswith("fresh") for origin in origins.values())
    student.get_input_embeddings().weight.data.add_(1.0)  # a copy, not a share
    assert not torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


@pytest.mark.parametrize("model_type", NAMES)
def test_all_layers_in_order_is_the_teacher(model_type: str) -> None:
    teacher = architectures.model(model_type)
    student = from_layers(teacher, (0, 1, 2, 3), model_type).model.eval()
    ids = torch.arange(5, 21).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, teacher(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "modernbert", "qwen3"])
def test_each_layer_keeps_its_kind_of_attention(model_type: str) -> None:
    """A local layer of the teacher stays local in the student, whatever the pattern was."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    changes = {"sliding_window": 16, "use_sliding_window": True} if model_type == "qwen3" else {}
    teacher = architectures.model(model_type, layer_types=kinds, **changes)
    student = from_layers(teacher, (0, 1, 3), model_type).model
    assert student.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert teacher.config.layer_types == kinds
    assert student.config.num_hidden_layers == 3


def test_modernbert_has_a_norm_too_few_in_its_first_layer() -> None:
    """Its layer 0 has no attention norm: copied elsewhere that norm is fresh, and the report says so."""
    teacher = architectures.model("modernbert")
    stack = layer_stack(teacher, 4, "teacher")
    built = from_layers(teacher, (0, 0, 2), "modernbert")
    origins = dict(built.origins)
    norm = f"{stack}.1.attn_norm.weight"
    assert origins[norm] == "fresh weights: the teacher has none of this name and shape"
    assert [name for name, origin in origins.items() if origin.startswith("fresh")] == [norm]
    assert (built.model.state_dict()[norm] == 1.0).all()
    assert origins[f"{stack}.1"] == f"teacher {stack}.0"


def test_a_wider_student_reports_what_it_could_not_copy() -> None:
    teacher = tiny.model("causal_lm")
    student = tiny.model("causal_lm", seed=1, intermediate_size=96, num_hidden_layers=2)
    before = student.model.layers[0].mlp.up_proj.weight.clone()
    origins = dict(copy_layers(student, teacher, (0, 3)))
    fresh = [name for name, origin in origins.items() if origin.startswith("fresh")]
    assert fresh == [f"model.layers.{n}.mlp.{part}_proj.weight" for n in (0, 1) for part in ("gate", "up", "down")]
    assert torch.equal(student.model.layers[0].mlp.up_proj.weight, before)


def test_two_stacks_of_the_same_height_are_refused() -> None:
    teacher = tiny.model("causal_lm")
    teacher.more = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(4)])
    with pytest.raises(ConfigError, match=r"teacher: LlamaForCausalLM has 2 stacks of 4 layers .*exactly one"):
        from_layers(teacher, 2, "llama")


def test_fresh_weights_are_those_of_the_seed() -> None:
    section = StudentSection(config=tiny.LLAMA)
    one, again, other = (build_student(section, "AutoModelForCausalLM", seed, None) for seed in (7, 7, 8))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    weights = (built.model.model.layers[0].mlp.up_proj.weight for built in (one, other))
    assert not torch.equal(*weights)
    assert one.origins == (("all", "drawn from seed 7"),)


def test_a_config_comes_from_a_mapping_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(tiny.LLAMA))
    folder = tiny.model_folder(tmp_path / "model", "causal_lm")
    configs = [
        student_config(StudentSection(config=where), None)
        for where in (tiny.LLAMA, str(tmp_path / "small.json"), str(folder))
    ]
    assert {(c.model_type, c.hidden_size, c.num_hidden_layers) for c in configs} == {("llama", 32, 4)}


def test_a_student_from_a_folder_has_its_weights(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "model", "causal_lm", seed=3)
    built = build_student(StudentSection(model=str(folder)), "AutoModelForCausalLM", 0, None)
    for name, tensor in tiny.model("causal_lm", seed=3).state_dict().items():
        assert torch.equal(built.model.state_dict()[name], tensor), name
    assert built.origins == (("all", str(folder)),)


def test_a_student_from_a_folder_trains_with_dropout(tmp_path: Path) -> None:
    """Loaded models come in evaluation mode; a student that stays there drops nothing and checkpoints nothing."""
    folder = tiny.model_folder(tmp_path / "model", "causal_lm")
    built = build_student(StudentSection(model=str(folder)), "AutoModelForCausalLM", 0, None)
    assert built.model.training


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("no/such/folder", "student.model: no model config at 'no/such/folder'"),
        ({"hidden_size": 8}, "student: a config needs model_type"),
        ({"model_type": "no_such_type"}, "student: no model config at"),
    ],
)
def test_models_that_are_not_there(where: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    section = StudentSection(model=where) if isinstance(where, str) else StudentSection(config=where)
    with pytest.raises(ConfigError, match=words):
        build_student(section, "AutoModelForCausalLM", 0, None)


def test_layers_without_a_teacher_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a teacher with weights"):
        build_student(StudentSection(init="teacher_layers", layers=2), "AutoModelForCausalLM", 0, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.model_folder(tmp_path / "model", "causal_lm")


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    section = TeacherSection(kind="online", model=str(folder), **settings)
    return load_model(section, "AutoModelForCausalLM", torch.float32, "teacher")


def as_pickle(folder: Path) -> None:
    torch.save(tiny.model("causal_lm").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_weights_in_a_pickle_alone_are_refused_unless_allowed(folder: Path) -> None:
    as_pickle(folder)
    with pytest.raises(ConfigError, match=r"only as a pickle \(pytorch_model.bin\).*teacher.allow_pickle: true"):
        load(folder)
    loaded = load(folder, allow_pickle=True)
    assert torch.equal(loaded.lm_head.weight, tiny.model("causal_lm").lm_head.weight)


def test_a_pickle_beside_safetensors_is_not_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"would fail if it were read")
    load(folder)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_damaged_weights_file_is_named(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    if damage == "missing":
        path.unlink()
    with pytest.raises(ConfigError, match=r"teacher\.model: cannot load"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(ConfigError, match=r"12 weights have another shape .*\(32, 64\), expected \(32, 80\)"):
        load(folder)


def test_missing_weights_are_counted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ConfigError, match=r"has no weights for 9 parameters of LlamaForCausalLM"):
        load(folder)


def test_a_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ConfigError, match=r"teacher\.model: no model config at"):
        load(folder)
