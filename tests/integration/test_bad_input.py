"""What a user can get wrong in a run: each is told in one clear message, with exit code 2 and nothing lost.

Damaged shards are in test_bad_shards.py, a full disk is in test_full_disk.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engine import Distiller
from engine.config.load import parse_config
from engine.config.run import RunConfig
from engine.errors import CheckpointError, ConfigError, TrainingError
from engine.runfolder import check_owner, write_start
from engine.schema import Batch, DenseTargets
from engine.teacher.online import OnlineTeacher
from tests import tiny
from tests.launching import distill, write_config
from tests.refusals import Settings, checkpoints, fail, parts_of, refused


@pytest.fixture
def root(run_root: Path) -> Path:
    return run_root


# the two configuration files


def test_a_misspelt_key_ends_the_command_with_code_2_the_line_and_the_nearest_name(root: Path) -> None:
    config = tiny.run_config(root)
    config["optimizer"]["learning_rat"] = config["optimizer"].pop("learning_rate")
    job = distill(config, root / "job")
    assert job.wait() == [2]
    line = next(n for n, text in enumerate((root / "job" / "run.yaml").read_text().splitlines(), 1) if "_rat:" in text)
    for words in (f"{root / 'job' / 'run.yaml'}:{line}", "optimizer.learning_rat", "learning_rate"):
        assert words in job.output()
    assert "Traceback" not in job.output()
    assert not (root / "runs").exists()


def test_a_number_in_two_places_that_disagree(root: Path) -> None:
    ds = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}
    refused(
        tiny.run_config(root, zero=ds), ConfigError, "gradient_clipping is 0.5", "optimizer.max_grad_norm gives 1.0"
    )
    (root / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}))
    words = (f"{root / 'ds.json'}: train_micro_batch_size_per_gpu is 4", "batch.micro_sequences gives 2")
    refused(tiny.run_config(root) | {"zero": str(root / "ds.json")}, ConfigError, *words)


def test_a_micro_batch_that_does_not_divide(root: Path) -> None:
    config = tiny.run_config(root, batch={"micro_sequences": 3})
    refused(config, ConfigError, "batch.micro_sequences = 3 does not divide", "use micro_sequences 2 or 4")


def test_fp16_on_a_cpu(root: Path) -> None:
    refused(tiny.run_config(root, run={"precision": "fp16"}), ConfigError, "precision fp16 is not supported on cpu")
    ds = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}
    refused(tiny.run_config(root, run={"precision": "auto"}, zero=ds), ConfigError, "fp16.enabled", "not supported")


def test_a_stage_3_option_at_stage_1(root: Path) -> None:
    ds = {"zero_optimization": {"stage": 1, "stage3_max_live_parameters": 1000}}
    words = ("stage3_max_live_parameters works only at stage 3, and the stage is 1",)
    refused(tiny.run_config(root) | {"zero": ds}, ConfigError, *words)


def test_a_yaml_that_is_not_there(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        Distiller(root / "nowhere.yaml")
    path = write_config(root / "run.yaml", tiny.run_config(root))
    with pytest.raises(ConfigError, match=r"run\.nam"):
        Distiller(path, ["run.nam=x"])


# models


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Two words have changed places."""
    vocabulary = tiny.tokenizer().get_vocab()
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")))


def test_teacher_and_student_with_different_tokenizers(root: Path) -> None:
    student = tiny.model_folder(root / "student", "causal_lm")
    other_tokenizer().save_pretrained(student)
    config = tiny.run_config(root) | {"student": {"model": str(student)}}
    words = ("the tokenizers of teacher and student differ", "id 8 is 'w3' / 'w4'", "must use the same tokenizer")
    refused(config, ConfigError, *words)


def test_a_padded_teacher_is_accepted_and_its_padding_has_no_part_in_the_loss(root: Path) -> None:
    """96 ids, a head of 128 rows: whatever the 32 rows hold, the same student comes out, and its own get no gradient.

    The student starts from the teacher, so its head is padded as well.
    """
    outcomes = []
    for filling in (0.0, 50.0):
        teacher = tiny.model("causal_lm", vocab_size=128, tie_word_embeddings=False)
        with torch.no_grad():
            teacher.lm_head.weight[96:] = filling
        teacher.save_pretrained(root / "teacher")
        name = f"padded{filling:.0f}"
        losses = [{"kind": kind} for kind in ("forward_kl", "logits_mse", "cross_entropy")]
        config = tiny.run_config(root, run={"name": name, "num_steps": 2}, losses=losses)
        config["optimizer"] = {"learning_rate": 0.01, "weight_decay": 0.0}
        Distiller(config).fit()
        student = transformers.AutoModelForCausalLM.from_pretrained(root / "runs" / name / "export")
        outcomes.append(student.state_dict())
        assert (student.lm_head.weight[96:] == filling).all()
    one, other = outcomes
    for weight in one:
        assert torch.equal(one[weight][:96], other[weight][:96]), weight


def test_a_head_smaller_than_the_tokenizer(root: Path) -> None:
    tiny.model("causal_lm", vocab_size=90).save_pretrained(root / "teacher")
    refused(tiny.run_config(root), ConfigError, "head has 90 rows, fewer than the tokenizer's 96 ids")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": {"layers": [0, 4]}}, ("student.layers: the teacher has no layer 4", "0 to 3")),
        ({"student": {"layers": 9}}, ("student.layers: 9 layers asked of a teacher that has 4",)),
    ],
)
def test_a_layer_to_copy_that_is_out_of_range(root: Path, changes: Settings, words: tuple[str, ...]) -> None:
    refused(tiny.run_config(root, **changes), ConfigError, *words)


def test_a_layer_to_compare_that_is_out_of_range_claims_no_folder(root: Path) -> None:
    """The next try, with the layer put right, is the same run to its folder."""
    config = tiny.run_config(root, losses=[{"kind": "hidden_mse", "layers": [[2, 7]]}])
    fail(config, ConfigError, "losses.0.layers: the teacher has no layer 7")
    assert not (root / "runs").exists()


def test_weights_that_are_only_a_pickle(root: Path) -> None:
    teacher = tiny.model("causal_lm")
    torch.save(teacher.state_dict(), root / "teacher" / "pytorch_model.bin")
    (root / "teacher" / "model.safetensors").unlink()
    config = tiny.run_config(root)
    refused(config, ConfigError, "only as a pickle (pytorch_model.bin)", "teacher.allow_pickle: true")
    config["teacher"]["allow_pickle"] = True
    assert parts_of(config).teacher is not None


# a run's folder


def test_a_folder_of_another_run_is_left_as_it_is(root: Path) -> None:
    Distiller(tiny.run_config(root, run={"num_steps": 3})).fit()
    folder = root / "runs" / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = tiny.run_config(root, run={"num_steps": 3}, optimizer={"learning_rate": 0.5})
    words = ("belongs to a run with other settings", "optimizer.learning_rate: was 0.01, is now 0.5", "run.name")
    fail(other, CheckpointError, *words)
    fail(other, CheckpointError, *words, resume=str(folder / "checkpoints" / "step_00000003"))
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before == after


def test_where_the_teacher_runs_may_change_and_how_its_weights_are_held_may_not(root: Path) -> None:
    def config(**teacher: Any) -> RunConfig:
        return parse_config(tiny.run_config(root, teacher=teacher))

    folder = root / "runs" / "run"
    write_start(folder, config(placement="tensor_parallel", tp_size=4), {}, {})
    check_owner(folder, config(placement="tensor_parallel", tp_size=2))
    check_owner(folder, config(placement="zero3"))
    check_owner(folder, config(overlap=True))
    check_owner(folder, config(offload="cpu"))
    with pytest.raises(CheckpointError, match=r"teacher\.quantize: was 'none', is now 'int8'"):
        check_owner(folder, config(quantize="int8"))


def test_resuming_from_what_is_no_checkpoint(root: Path) -> None:
    fail(tiny.run_config(root), CheckpointError, "not a complete checkpoint", resume=str(root / "teacher"))


def test_resuming_on_other_data(root: Path) -> None:
    Distiller(tiny.run_config(root, run={"num_steps": 3})).fit()
    tiny.shards(root / "other", "causal_lm", seed=9)
    config = tiny.run_config(root, data={"manifest": str(root / "other" / "manifest.json")})
    fail(config, CheckpointError, "was trained on other data")
    assert checkpoints(root) == ["step_00000003"]


def test_resuming_with_another_zero_stage(root: Path) -> None:
    Distiller(tiny.run_config(root, run={"num_steps": 3})).fit()
    config = tiny.run_config(root) | {"zero": {"zero_optimization": {"stage": 3}}}
    fail(config, CheckpointError, "was written under ZeRO stage 2, this run uses 3")


def test_resuming_in_another_precision(root: Path) -> None:
    Distiller(tiny.run_config(root, run={"num_steps": 3, "precision": "auto"})).fit()
    in_bf16 = tiny.run_config(root, run={"num_steps": 4, "precision": "auto"})
    in_bf16["zero"] = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    fail(in_bf16, CheckpointError, "was trained in fp32, this run uses bf16; set run.precision: fp32")
    Distiller(tiny.run_config(root, run={"num_steps": 4, "precision": "fp32"})).fit()
    assert checkpoints(root)[-1] == "step_00000004", "as the message said"


@pytest.mark.parametrize("victim", ["zero/mp_rank_00_model_states.pt", "state/rank_00000.pt", "meta.json"])
def test_a_damaged_checkpoint_is_named(root: Path, victim: str) -> None:
    config = tiny.run_config(root, run={"num_steps": 3})
    Distiller(config).fit()
    path = root / "runs" / "run" / "checkpoints" / "step_00000003" / victim
    path.write_bytes(path.read_bytes()[:40])
    fail(tiny.run_config(root), CheckpointError, "step_00000003")


# numbers that go wrong


def test_a_loss_that_is_nan_names_its_samples_and_writes_no_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The micro-batch is named; the others of the step are not accused, and no weights of it reach the disk."""
    own, met = OnlineTeacher.targets_for, []

    def poisoned(self: OnlineTeacher, batch: Batch, rows: torch.Tensor) -> DenseTargets:
        met.append(batch.names)
        targets = own(self, batch, rows)
        return replace(targets, hidden=targets.hidden * float("nan")) if len(met) == 4 * 4 + 2 else targets

    monkeypatch.setattr(OnlineTeacher, "targets_for", poisoned)  # the second of the four micro-batches of step 5
    config = tiny.run_config(root, checkpoint={"every_steps": 1})
    told = fail(config, TrainingError, "was NaN or Inf in or before step", "lower optimizer.learning_rate")
    assert all(name in told for name in met[17]), told
    assert checkpoints(root) == ["step_00000003", "step_00000004"]
    lines = (root / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    assert all("step" in json.loads(line) for line in lines)


def test_a_teacher_whose_weights_are_nan(root: Path) -> None:
    model = tiny.model("causal_lm")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(root / "teacher")
    refused(tiny.run_config(root, student={"init": None, "layers": None, "config": tiny.LLAMA}), ConfigError,
            "teacher (LlamaForCausalLM): its logits are NaN or Inf")  # fmt: skip


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_that_explodes_is_stopped(root: Path, stage: int) -> None:
    config = tiny.run_config(root, optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0})
    config |= {"zero": {"zero_optimization": {"stage": stage}}}
    told = fail(config, TrainingError, "was NaN or Inf in or before step", "lower optimizer.learning_rate")
    assert "shard-00000" in told
