"""What a run comes to on so many ranks, and every contradiction with its numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import parse_config
from engine.config.resolve import Accelerator, DataFacts, ResolvedRun, read_deepspeed_json, resolve
from engine.data.order import DataOrder
from engine.errors import ConfigError

GPU = Accelerator("cuda", ("bf16", "fp16", "fp32"))
OLD_GPU = Accelerator("cuda", ("fp16", "fp32"))
CPU = Accelerator("cpu", ("fp32", "bf16"))
DATA = DataFacts(num_samples=10_000, sequence_tokens=128, vocab_size=1000, task="causal_lm")
RUN: dict[str, Any] = {
    "run": {"name": "demo", "num_steps": 100},
    "task": {"kind": "causal_lm"},
    "student": {"model": "student"},
    "teacher": {"kind": "online", "model": "teacher"},
    "data": {"manifest": "m.json"},
    "batch": {"global_sequences": 64, "micro_sequences": 4},
    "losses": [{"kind": "forward_kl"}],
}
ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def resolved(
    changes: dict[str, Any] | None = None,
    ds: dict[str, Any] = ZERO2,
    *,
    world_size: int = 8,
    accelerator: Accelerator = GPU,
    data: DataFacts = DATA,
) -> ResolvedRun:
    mapping = copy.deepcopy(RUN)
    for name, values in (changes or {}).items():
        mapping[name] = mapping.get(name, {}) | values if isinstance(values, dict) else values
    return resolve(
        parse_config(mapping),
        world_size=world_size,
        accelerator=accelerator,
        data=data,
        deepspeed_json=ds,
        deepspeed_name="ds.json",
    )


def refused(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        resolved(*arguments, **settings)
    return str(error.value)


@pytest.mark.parametrize(("world_size", "micro", "accumulation"), [(1, 4, 16), (8, 4, 2), (8, 8, 1), (16, 1, 4)])
def test_a_step_is_cut_without_remainder(world_size: int, micro: int, accumulation: int) -> None:
    batch = resolved({"batch": {"micro_sequences": micro}}, world_size=world_size).batch
    assert batch.accumulation == accumulation
    assert batch.local_sequences == micro * accumulation
    assert batch.world_size * batch.accumulation * batch.micro_sequences == batch.global_sequences == 64


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        (
            {"batch": {"global_sequences": 100}},
            8,
            "batch.global_sequences = 100 cannot be shared evenly by 8 ranks; the nearest that can: 96 or 104",
        ),
        ({"batch": {"global_sequences": 3}}, 8, "nearest that can: 8"),
        (
            {"batch": {"global_sequences": 96, "micro_sequences": 5}},
            8,
            "96 / 8 = 12 sequences a step, which batch.micro_sequences = 5 does not divide; "
            "use micro_sequences 4 or 6, or global_sequences 80 or 120",
        ),
        (
            {"batch": {"global_sequences": 96}},
            12,
            "data.lanes = 64 cannot be shared evenly by 12 ranks; the nearest that can: 60 or 72",
        ),
        (
            {"data": {"lanes": 16384}},
            8,
            "m.json holds 10,000 samples, fewer than data.lanes = 16384; set data.lanes to at most 10000",
        ),
        ({"task": {"kind": "masked_lm"}}, 8, "m.json was built for causal_lm, but task.kind is masked_lm"),
    ],
)
def test_numbers_that_do_not_fit(changes: dict[str, Any], world_size: int, words: str) -> None:
    assert words in refused(changes, world_size=world_size)


def test_epochs_count_what_the_order_of_the_data_gives() -> None:
    order = DataOrder([DATA.num_samples], seed=0, lanes=64, shuffle_samples=8)
    run = resolved({"run": {"num_steps": None, "num_epochs": 2.0}})
    assert (run.num_steps - 1) * 64 < 2 * order.sequences_per_epoch <= run.num_steps * 64


@pytest.mark.parametrize(
    ("wanted", "ds", "accelerator", "got"),
    [
        ("auto", {}, GPU, "bf16"),
        ("auto", {}, OLD_GPU, "fp16"),
        ("auto", {}, CPU, "fp32"),
        ("auto", {"bf16": {"enabled": True}}, CPU, "bf16"),
        ("auto", {"fp16": {"enabled": True}}, GPU, "fp16"),
        ("auto", {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, GPU, "bf16"),
        ("auto", {"bf16": {"enabled": False}}, GPU, "fp16"),
        ("fp32", {"bf16": {"enabled": "auto"}}, GPU, "fp32"),
        ("bf16", {"bf16": {"enabled": True}}, GPU, "bf16"),
    ],
)
def test_precision(wanted: str, ds: dict[str, Any], accelerator: Accelerator, got: str) -> None:
    run = resolved({"run": {"precision": wanted}}, ZERO2 | ds, accelerator=accelerator)
    assert run.precision == run.teacher_precision == got
    assert run.deepspeed.get("bf16", {}).get("enabled", False) == (got == "bf16")
    assert run.deepspeed.get("fp16", {}).get("enabled", False) == (got == "fp16")


def test_precisions_that_cannot_be() -> None:
    fp16, bf16 = {"fp16": {"enabled": True}}, {"bf16": {"enabled": True}}
    words = "precision fp16 is not supported on cpu; use bf16, fp32 or auto"
    assert refused({"run": {"precision": "fp16"}}, accelerator=CPU) == f"run.precision: {words}"
    assert refused({}, ZERO2 | fp16, accelerator=CPU) == f"fp16.enabled in ds.json: {words}"
    assert refused({"teacher": {"precision": "fp16"}}, accelerator=CPU) == f"teacher.precision: {words}"
    assert "run.precision is bf16 but fp16.enabled is true in ds.json" in refused(
        {"run": {"precision": "bf16"}}, ZERO2 | fp16
    )
    assert "run.precision is bf16 but bf16.enabled is false" in refused(
        {"run": {"precision": "bf16"}}, ZERO2 | {"bf16": {"enabled": False}}
    )
    assert "both true" in refused({}, ZERO2 | fp16 | bf16)


def test_deepspeed_is_filled_and_keeps_what_it_owns() -> None:
    ds = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "fp16": {"enabled": "auto", "initial_scale_power": 8, "loss_scale": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": 7},
    }
    before = copy.deepcopy(ds)
    run = resolved({"run": {"precision": "fp16"}, "optimizer": {"learning_rate": 0.125}}, ds)
    assert ds == before
    assert "auto" not in json.dumps(run.deepspeed)
    assert run.deepspeed["train_batch_size"] == 64
    assert run.deepspeed["train_micro_batch_size_per_gpu"] == 4
    assert run.deepspeed["gradient_accumulation_steps"] == 2
    assert run.deepspeed["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert run.deepspeed["bf16"] == {"enabled": False}
    assert run.deepspeed["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 7}
    assert run.deepspeed["optimizer"]["params"] == {
        "lr": 0.125, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01
    }  # fmt: skip
    assert run.zero_stage == 3


def test_without_an_optimizer_section_none_is_made() -> None:
    assert "optimizer" not in resolved().deepspeed


@pytest.mark.parametrize(
    ("ds", "words"),
    [
        ({"train_batch_size": 32}, "ds.json: train_batch_size is 32 but batch.global_sequences gives 64"),
        ({"train_micro_batch_size_per_gpu": 1}, "batch.micro_sequences gives 4"),
        ({"gradient_accumulation_steps": 9}, "gradient_accumulation_steps is 9 but the batch section gives 2"),
        ({"gradient_clipping": 0.5}, "optimizer.max_grad_norm gives 1.0"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}},
            "optimizer.params.lr is 1.0 but optimizer.learning_rate",
        ),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas is [0.9, 0.999]"),
        ({"optimizer": {"type": "Lamb", "params": {}}}, "the run's optimizer is AdamW"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "the run's optimizer is AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "ds.json: scheduler: the run's schedule section owns"),
        (
            {"gradient_acumulation_steps": 2},
            "unknown key, DeepSpeed would ignore it; did you mean `gradient_accumulation_steps`?",
        ),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "zero_optimization.overlap_com: unknown option, DeepSpeed would ignore it; did you mean `overlap_comm`?",
        ),
        (
            {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1}},
            "zero_optimization.stage3_max_live_parameters works only at stage 3, and the stage is 2",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
            "offload_param works only at stage 3",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, found 4"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer needs stage 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "needs DeepSpeed's own CPU optimizer",
        ),
        ({"zero_optimization": [2]}, "zero_optimization: expected an object"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: the engine's scaling"),
        (
            {"tensor_parallel": {"autotp_size": "auto"}},
            'tensor_parallel.autotp_size is "auto", and the run has no value',
        ),
    ],
)
def test_a_deepspeed_json_that_says_otherwise(ds: dict[str, Any], words: str) -> None:
    assert words in refused({}, ZERO2 | ds)


def test_idle_stage_3_options_are_let_through() -> None:
    zero = {"stage": 2, "offload_param": {"device": "none"}, "stage3_gather_16bit_weights_on_model_save": False}
    assert resolved({}, {"zero_optimization": zero}).zero_stage == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"teacher": {"kind": "none", "model": None}},
            "teacher.kind is none, but losses.0 (forward_kl) needs a teacher",
        ),
        ({"losses": [{"kind": "cross_entropy"}]}, "no term compares with the teacher"),
        (
            {"losses": [{"kind": "forward_kl", "weight": {"start": 1, "end": 0, "to_step": 101}}]},
            "losses.0.weight.to_step = 101 is beyond the run's 100 steps",
        ),
        (
            {"losses": [{"kind": "forward_kl", "temperature": {"start": 1, "end": 2, "from_step": 100}}]},
            "losses.0.temperature.from_step = 100 is not within",
        ),
        ({"evaluation": {"every_steps": 10}}, "evaluation.every_steps = 10, but there is no evaluation.manifest"),
        ({"schedule": {"kind": "plateau"}}, "plateau follows the held-out loss; set evaluation.manifest and"),
        (
            {"schedule": {"milestones": [5]}},
            "schedule.milestones has no effect with schedule.kind: cosine; it is for multi_step",
        ),
        ({"schedule": {"kind": "multi_step"}}, "multi_step needs schedule.milestones"),
        ({"schedule": {"kind": "multi_step", "milestones": [9, 5]}}, "schedule.milestones must rise, found [9, 5]"),
        ({"schedule": {"kind": "multi_step", "milestones": [5, 100]}}, "100 is not within the run's 100 steps"),
        ({"schedule": {"warmup_steps": 100}}, "schedule.warmup_steps = 100 takes all of the run's 100 steps"),
        (
            {"schedule": {"kind": "wsd", "warmup_steps": 50, "decay_steps": 60}},
            "50 + 60 is more than the run's 100 steps",
        ),
        ({"schedule": {"kind": "constant", "final_fraction": 0.1}}, "schedule.final_fraction has no effect"),
        ({"task": {"mask_fraction": 0.3}}, "task.mask_fraction has no effect with task.kind: causal_lm"),
    ],
)
def test_settings_that_contradict_or_do_nothing(changes: dict[str, Any], words: str) -> None:
    assert words in refused(changes)


def test_contradictions_are_told_together() -> None:
    text = refused({"schedule": {"warmup_steps": 100, "patience": 9}, "evaluation": {"every_steps": 1}})
    assert len(text.splitlines()) == 3


def test_layers_without_distillation_are_a_baseline() -> None:
    student = {"model": None, "init": "teacher_layers", "layers": 2}
    assert resolved({"student": student, "losses": [{"kind": "cross_entropy"}]}).num_steps == 100


def test_reading_the_json(tmp_path: Path) -> None:
    path = tmp_path / "zero2_bf16.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    assert read_deepspeed_json(str(path)) == (ZERO2, str(path))
    assert read_deepspeed_json(ZERO2) == (ZERO2, "zero")
    with pytest.raises(ConfigError, match=r"No such file or directory; did you mean `zero2_bf16\.json`\?"):
        read_deepspeed_json(str(tmp_path / "zero2_bf61.json"))
    for text, words in (("{", "not valid JSON"), ("[]", "expected a JSON object"), ('{"a": 1, "a": 2}', "given twice")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_deepspeed_json(str(path))
