"""Planning on shapes: FLOPs and memory against what torch itself counts, and the program's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from engine.cost import (
    count_parameters,
    forward_flops_per_token,
    head_flops_per_position,
    peak_flops,
    training_flops_per_token,
)
from engine.memory import activation_bytes
from engine.models import shell
from engine.planning import Machine, Planner
from tests import tiny
from tests.launching import ROOT

LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "vocab_size": 50257,
    "use_cache": False,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300, "n_positions": 128,
        "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1, "use_cache": False}  # fmt: skip
MODELS = {
    "llama": (tiny.LLAMA | {"max_position_embeddings": 128, "use_cache": False}, "AutoModelForCausalLM"),
    "gpt2": (GPT2, "AutoModelForCausalLM"),
    "bert": (tiny.BERT | {"max_position_embeddings": 128}, "AutoModelForMaskedLM"),
}


def meta(config: dict[str, Any], model_class: str) -> PreTrainedModel:
    return shell(transformers.AutoConfig.for_model(**config), model_class)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    config, model_class = MODELS[name]
    settings = transformers.AutoConfig.for_model(**config)
    model = getattr(transformers, model_class).from_config(settings, attn_implementation="eager")
    ids = torch.zeros(2, 128, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    ours = forward_flops_per_token(model, 128) + head_flops_per_position(model)
    assert 256 * ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_flops_of_a_training_token() -> None:
    student, teacher = (
        meta(
            LLAMA | {"model_type": "llama", "num_hidden_layers": n, "tie_word_embeddings": True}, "AutoModelForCausalLM"
        )
        for n in (4, 8)
    )
    head = head_flops_per_position(student)
    assert head == 2 * 50257 * 256
    without_attention = training_flops_per_token(student, teacher, sequence_tokens=0)
    assert without_attention == pytest.approx(134.5e6, rel=1e-3)  # by hand: (6 * 4 + 2 * 8) * 790,528 weights + 4 heads
    body = without_attention - 4 * head
    half = training_flops_per_token(student, teacher, 0, head_positions_fraction=0.5)
    assert half == pytest.approx(body + 2 * head)
    recomputed = training_flops_per_token(student, None, 64, gradient_checkpointing=True)
    once = training_flops_per_token(student, None, 64)
    assert recomputed - once == pytest.approx(forward_flops_per_token(student, 64))


def test_of_experts_only_the_chosen_count() -> None:
    config = tiny.LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    chosen = forward_flops_per_token(meta(config, "AutoModelForCausalLM"), 0)
    every = forward_flops_per_token(meta(config | {"num_experts_per_tok": 8}, "AutoModelForCausalLM"), 0)
    experts = 2.0 * 4 * 8 * (3 * 32 * 64)  # layers, experts, gate up and down
    assert every - chosen == pytest.approx(experts * 6 / 8)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_once(tied: bool) -> None:
    model = tiny.model("causal_lm", tie_word_embeddings=tied)
    counted = count_parameters(model)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.total - counted.in_layers == 96 * 32 * (1 if tied else 2)


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A10", "fp32", 31.2e12),
        ("Tesla T4", "fp16", 65e12),
        ("Tesla T4", "bf16", None),
        ("h100", "bf16", 989e12),
        ("A1000 Laptop", "bf16", None),
        ("abacus", "fp32", None),
    ],
)
def test_peaks(device: str, precision: str, expected: float | None) -> None:
    assert peak_flops(device, precision) == expected


def saved_bytes(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """What autograd really keeps of a forward pass of a real model, its head left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    model.get_output_embeddings().forward = lambda state: state
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_saves(name: str, precision: str) -> None:
    config, model_class = MODELS[name]
    auto = getattr(transformers, model_class)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    real = auto.from_config(transformers.AutoConfig.for_model(**config)).to(dtype)
    expected = saved_bytes(real, torch.zeros(2, 128, dtype=torch.long))
    predicted = activation_bytes(meta(config, model_class), precision, 2, 128, gradient_checkpointing=False)
    assert expected * 0.98 <= predicted <= expected * 1.10  # grouped keys count as repeated


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    model = meta(*MODELS["llama"])
    one = activation_bytes(model, "bf16", 1, 64, gradient_checkpointing=False)
    four = activation_bytes(model, "bf16", 4, 64, gradient_checkpointing=False)
    assert four == pytest.approx(4 * one, rel=0.02)
    assert activation_bytes(model, "bf16", 4, 64, gradient_checkpointing=True) < four / 2


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """A run of a Llama of 30 M parameters; no weights and no shards lie anywhere."""
    (tmp_path / "teacher").mkdir()
    config = LLAMA | {"model_type": "llama", "num_hidden_layers": 8}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    run = {
        "run": {"name": "demo", "num_epochs": 2},
        "task": {"kind": "causal_lm"},
        "student": {"init": "teacher_layers", "layers": 4},
        "teacher": {"kind": "online", "model": str(tmp_path / "teacher")},
        "data": {"manifest": str(tmp_path / "manifest.json")},
        "batch": {"global_sequences": 256, "micro_sequences": 32},
        "losses": [{"kind": "forward_kl"}],
        "zero": "ds_configs/zero2_bf16.json",
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def preflight(*words: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "launch" / "preflight.py")
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_preflight_says_yes_no_and_what_would_help(run_yaml: Path) -> None:
    words = ["--config", str(run_yaml), "--world-size", "4", "--device", "H100"]
    words += ["--samples", "100000", "--sequence-tokens", "1024"]
    fits = preflight(*words, "--device-memory", "80GB")
    assert fits.returncode == 0, fits.stderr
    assert "Verdict     YES" in fits.stdout
    assert "= 4 ranks x 2 micro-batches x 32 sequences" in fits.stdout
    assert "781 steps" in fits.stdout  # 2 x 99,968 sequences of 64 lanes, by 256
    assert all(len(line) <= 80 for line in fits.stdout.splitlines())
    too_small = preflight(*words, "--device-memory", "5.5GB")
    assert too_small.returncode == 1, too_small.stderr
    assert "Verdict     NO" in too_small.stdout
    assert "fits            batch.micro_sequences=" in too_small.stdout
    assert "run.gradient_checkpointing=true" in too_small.stdout


def test_a_cache_of_states_takes_the_room_of_its_head(run_yaml: Path) -> None:
    def planned(*overrides: str) -> dict[str, int]:
        machine = Machine("cuda", 1, 80 * 10**9, None, 0.4)
        parts = Planner(str(run_yaml), overrides, machine, 100_000, 1024).plan().parts
        return {part.name: part.num_bytes for part in parts}

    online, few_ids = planned(), planned("teacher.kind=cached", "teacher.cache=t")
    states = planned("teacher.kind=cached", "teacher.cache=t", "cache.codec.kind=hidden")
    assert states["teacher head and states, cached"] == 50257 * 256 * 2
    loss = "vocabulary head and loss"
    assert few_ids[loss] < states[loss] == online[loss]
    assert not any("teacher" in name for name in few_ids)


@pytest.mark.parametrize(("kind", "num_states"), [("forward_kl", 1), ("hidden_mse", 8 + 2)], ids=["logits", "hidden"])
def test_overlap_keeps_a_second_set_of_targets(run_yaml: Path, kind: str, num_states: int) -> None:
    run = yaml.safe_load(run_yaml.read_text())
    run["losses"] = [{"kind": "forward_kl"}] + ([{"kind": kind, "layers": "spread"}] if kind == "hidden_mse" else [])
    run_yaml.write_text(yaml.safe_dump(run))

    def forward_pass(*overrides: str) -> int:
        parts = Planner(str(run_yaml), overrides, Machine("cuda", 1, 80 * 10**9, None, 0.4), 100_000, 1024).plan().parts
        return next(part.num_bytes for part in parts if part.name == "teacher forward pass")

    added = forward_pass("teacher.overlap=true") - forward_pass()
    assert added == num_states * (32 * 1024) * 256 * 2


def test_preflight_finds_what_the_run_would_refuse(run_yaml: Path) -> None:
    odd = preflight("--config", str(run_yaml), "--world-size", "3", "--samples", "1000", "--sequence-tokens", "64")
    assert odd.returncode == 2
    assert "data.lanes = 64 cannot be shared evenly by 3 ranks" in odd.stderr + odd.stdout
    unbuilt = preflight("--config", str(run_yaml))
    assert unbuilt.returncode == 2
    assert "give --samples and --sequence-tokens" in unbuilt.stderr + unbuilt.stdout
