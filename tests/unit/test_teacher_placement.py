"""Where a teacher's weights may lie: what is refused, what a rank alone can do, and the bytes foretold."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config.run import TeacherSection
from engine.errors import ConfigError
from engine.losses.head import keep_head_whole
from engine.schema import Batch
from engine.teacher import quantized
from engine.teacher.footprint import teacher_bytes
from engine.teacher.offload import stream_weights
from engine.teacher.online import OnlineTeacher
from engine.teacher.placing import alone, check_placement, load_teacher, place_alone
from engine.teacher.tensor_parallel import plan_cuts
from tests import tiny
from tests.caching import cached_run, files_of, make_cache
from tests.unit.test_resolve import refused

HOST = torch.device("cpu")
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


def section(**settings: Any) -> TeacherSection:
    return TeacherSection(kind="online", **({"model": "teacher"} | settings))


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"placement": "tensor_parallel"}, "teacher.tp_size goes with teacher.placement: tensor_parallel"),
        ({"tp_size": 2}, "teacher.tp_size goes with teacher.placement: tensor_parallel"),
        ({"placement": "tensor_parallel", "tp_size": 3}, "tp_size = 3 does not divide 8 ranks; use tp_size 2 or 4, or"),
        ({"placement": "tensor_parallel", "tp_size": 2, "offload": "cpu"}, "use placement: zero3"),
        ({"placement": "zero3", "overlap": True}, "teacher.overlap needs placement: replicated"),
        ({"placement": "zero3", "quantize": "int8"}, "int8 needs placement: replicated and offload: none"),
        ({"offload": "cpu", "quantize": "int8"}, "int8 needs placement: replicated and offload: none"),
        ({"kind": "cached", "cache": "c", "placement": "zero3"}, "use placement: replicated, with offload: cpu"),
        ({"kind": "cached", "cache": "c", "overlap": True}, "teacher.overlap has no effect"),
    ],
)
def test_what_does_not_go_together_is_refused(teacher: dict[str, Any], words: str) -> None:
    assert words in refused({"teacher": teacher})


@pytest.mark.parametrize(
    "setting", [{"placement": "zero3"}, {"offload": "cpu"}, {"quantize": "int8"}, {"overlap": True}], ids=str
)
def test_without_a_teacher_there_is_nothing_to_place(setting: dict[str, Any]) -> None:
    text = refused({"teacher": {"kind": "none", "model": None} | setting, "losses": [{"kind": "cross_entropy"}]})
    assert f"teacher.{next(iter(setting))}" in text
    assert "has no effect with teacher.kind: none" in text


def test_heads_that_cannot_be_shared_are_told_before_weights_are_read(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(**tiny.LLAMA)
    config.save_pretrained(tmp_path)  # and no weights
    wanted = section(model=str(tmp_path), placement="tensor_parallel", tp_size=4)
    with pytest.raises(ConfigError, match=r"tp_size = 4 does not divide the teacher's num_key_value_heads = 2"):
        check_placement(wanted, "AutoModelForCausalLM")


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("masked_lm", {}, "no plan"),
        ("causal_lm", {"model_type": "mixtral", "num_local_experts": 2}, "cannot cut"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_by_name(task: str, changes: dict[str, Any], words: str) -> None:
    with torch.device("meta"):
        model = tiny.model(task, **changes)
    with pytest.raises(ConfigError, match=words) as caught:
        plan_cuts(model)
    assert type(model).__name__ in str(caught.value)
    assert "placement: zero3" in str(caught.value)


def test_every_matrix_of_a_layer_is_cut() -> None:
    with torch.device("meta"):
        model = tiny.model("causal_lm")
    cut = {id(cut.module) for cut in plan_cuts(model)}
    names = {name for name, module in model.named_modules() if id(module) in cut}
    matrices = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    assert names == {f"model.layers.{layer}.{name}" for layer in range(4) for name in matrices}


def batch() -> Batch:
    ids = torch.randint(5, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(32)
    places = torch.arange(16).expand(2, 16)
    return Batch(ids, ids, torch.ones(2, 16, dtype=torch.int32), places, rows, rows, False, ("a", "b"))


def asked(model: transformers.PreTrainedModel, task: str) -> list[torch.Tensor]:
    class Plain:
        over_vocabulary = True

        def model_inputs(self, batch: Batch, model: transformers.PreTrainedModel) -> dict[str, Any]:
            return {"input_ids": batch.input_ids} | ({} if task == "masked_lm" else {"use_cache": False})

        def logits(self, output: Any, batch: Batch) -> torch.Tensor:
            raise AssertionError

    answer = OnlineTeacher(model, Plain(), hidden_states=True).states_for(batch(), torch.arange(32))
    logits = answer.hidden @ answer.head.weight.t().to(answer.hidden.dtype)
    return [answer.hidden, logits, *answer.hidden_states]


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_a_streamed_teacher_says_the_same_and_leaves_nothing_on_the_device(task: str) -> None:
    whole = asked(tiny.model(task).eval(), task)
    model = tiny.model(task).eval()
    keep_head_whole(model, HOST, torch.float32)
    stream_weights(model, HOST)
    host = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    seen: dict[str, int] = {}
    first_norm = next(m for m in model.modules() if "Norm" in type(m).__name__)
    first_norm.register_forward_hook(lambda module, *_: seen.update(there=module.weight.data_ptr()), prepend=True)
    for ours, theirs in zip(asked(model, task), whole):
        assert torch.equal(ours, theirs)
    assert seen["there"] not in host.values(), "a module computes with a copy"
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == host


def test_the_weights_of_a_teacher_to_be_cut_are_mapped_as_their_files_have_them(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    tiny.model("causal_lm").to(torch.bfloat16).save_pretrained(folder)
    for settings, dtype in (({}, torch.float32), ({"placement": "zero3"}, torch.bfloat16)):
        model = load_teacher(section(model=str(folder), **settings), "AutoModelForCausalLM")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_without_torchao_int8_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps torchao"):
        check_placement(section(quantize="int8"), "AutoModelForCausalLM")


@pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")
@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_int8_is_near_the_whole_teacher_and_takes_the_bytes_foretold(task: str) -> None:
    whole = asked(tiny.model(task).eval(), task)
    model = tiny.model(task).eval()
    foretold = teacher_bytes(model, section(quantize="int8"), 4, 1)
    place_alone(model, section(quantize="int8"), "fp32", HOST)
    found = asked(model, task)
    assert not torch.equal(found[0], whole[0])
    for ours, theirs in zip(found, whole):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()
    assert sum(map(held_bytes, model.parameters())) == foretold.weights
    assert foretold.weights < 0.6 * teacher_bytes(model, section(), 4, 1).weights


def held_bytes(parameter: Any) -> int:
    """Also of a tensor of torchao's, which is made of several."""
    if hasattr(parameter, "__tensor_flatten__"):
        return sum(held_bytes(getattr(parameter, name)) for name in parameter.__tensor_flatten__()[0])
    return parameter.numel() * parameter.element_size()


def test_bytes_of_each_placement() -> None:
    """Llama with a tied head: 96 x 32 in the embeddings, 4 layers, all that is cut in them, and norms."""
    with torch.device("meta"):
        model = tiny.model("causal_lm")
    head, total = 96 * 32, sum(parameter.numel() for parameter in model.parameters())
    norms = 9 * 32
    cut = total - head - norms
    assert teacher_bytes(model, section(), 2, 4).weights == 2 * total
    assert teacher_bytes(model, section(placement="zero3"), 2, 4).weights == 2 * (total // 4 + head)
    offloaded = teacher_bytes(model, section(placement="zero3", offload="cpu"), 2, 4)
    assert (offloaded.weights, offloaded.host) == (2 * head, 2 * total // 4)
    both = teacher_bytes(model, section(placement="tensor_parallel", tp_size=2), 2, 4)
    assert both.weights == 2 * (head + head + norms + cut // 2), "the head lies beside the tied embeddings"
    streamed = teacher_bytes(model, section(offload="cpu"), 2, 4)
    assert (streamed.weights, streamed.host) == (2 * head, 2 * total)


def test_ranks_that_fill_a_cache_each_for_itself_cannot_share_a_teacher(tmp_path: Path) -> None:
    config = cached_run(tmp_path, teacher={"kind": "online", "cache": "sampled", "placement": "zero3"})
    with pytest.raises(ConfigError, match="each rank is a job of its own"):
        make_cache(config)


def test_a_streamed_teacher_fills_the_same_cache(tmp_path: Path) -> None:
    found = []
    for offload in ("none", "cpu"):
        config = cached_run(tmp_path, teacher={"offload": offload, "cache": str(tmp_path / offload)})
        found.append(files_of(Path(make_cache(config).path)))
    assert len(found[0]) > 3
    assert {n: c for n, c in found[0].items() if n.endswith(".tar")} == {
        n: c for n, c in found[1].items() if n.endswith(".tar")
    }


def test_one_rank_alone_streams_what_all_had_together() -> None:
    together = section(placement="tensor_parallel", tp_size=4)
    assert alone(together).model_dump() == section(offload="cpu").model_dump()
    assert alone(section(overlap=True)).model_dump() == section().model_dump()
