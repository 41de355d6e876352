"""The ways to make one training step that step_time.py compares: each takes a case and gives seconds a step."""

from __future__ import annotations

import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import ROOT
from torch import Tensor
from torch.nn import functional as F

from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.data.shards import ShardSet
from engine.losses.block import LogitLoss
from engine.losses.fused import FusedInputs, fused_head_loss
from engine.schema import Batch, DenseTargets, Head
from engine.tasks.causal_lm import CausalLM

SEQUENCES, TOKENS = 4, 512
TEMPERATURE = 2.0
LEARNING_RATE, MAX_GRAD_NORM = 5e-4, 1.0
TEACHER_LAYERS, STUDENT_LAYERS = 8, 4
LLAMA = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 683,
    "max_position_embeddings": TOKENS,
    "tie_word_embeddings": True,
}
ENGINE, NAIVE, FUSED, NO_TEACHER, TRL = "engine", "bare, naive KL", "bare, fused loss", "bare, no teacher", "TRL GKD"


def num_steps(case: dict[str, Any]) -> int:
    return (1 + int(case["blocks"])) * int(case["block_steps"])


def engine_way(case: dict[str, Any]) -> dict[str, Any]:
    """The whole engine on one rank under ZeRO-2, as ``launch/distill.py`` runs it; times are its own."""
    from engine.distiller import Distiller

    folder = Path(case["folder"])
    config = {
        "run": {"name": case["name"], "output": str(folder / "runs"), "num_steps": num_steps(case)},
        "task": {"kind": "causal_lm"},
        "student": {"model": str(folder / "student")},
        "teacher": {"kind": "online", "model": str(folder / "teacher"), "overlap": case.get("overlap", False)},
        "data": {"manifest": str(folder / "shards" / "manifest.json")},
        "batch": {"global_sequences": SEQUENCES, "micro_sequences": SEQUENCES // case.get("micro_batches", 1)},
        "losses": [{"kind": "forward_kl", "temperature": TEMPERATURE}, {"kind": "cross_entropy"}],
        "optimizer": {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every_steps": 10**6},
        "tracking": {"every_steps": case["block_steps"]},
        "zero": str(ROOT / "ds_configs" / "cpu_zero2.json"),
    }
    Distiller(config).fit()
    lines = (folder / "runs" / case["name"] / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "throughput/step_seconds" in record][1:]
    phases = {key: statistics.median(r[key] for r in records) for key in records[0] if key.startswith("seconds/")}
    return {
        "step_seconds": [record["throughput/step_seconds"] for record in records],
        "peak_bytes": records[-1]["memory/peak_bytes"],  # the report and the export that follow are no part of a step
        "phases": phases,
    }


def bare_way(case: dict[str, Any]) -> dict[str, Any]:
    """A loop as one writes it in PyTorch."""
    folder = Path(case["folder"])
    student = transformers.LlamaForCausalLM.from_pretrained(folder / "student")
    teacher = None
    if case["way"] != NO_TEACHER:
        teacher = transformers.LlamaForCausalLM.from_pretrained(folder / "teacher").eval().requires_grad_(False)
    loss_of = {NAIVE: naive_loss, FUSED: fused_loss, NO_TEACHER: no_teacher_loss}[case["way"]]
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
    steps = batches(folder, num_steps(case))
    marks = [time.perf_counter()]
    for step, batch in enumerate(steps, 1):
        loss_of(student, teacher, batch).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % case["block_steps"] == 0:
            marks.append(time.perf_counter())
    return {"step_seconds": block_seconds(marks, case)}


def batches(folder: Path, number: int) -> list[Batch]:
    """The micro-batches of the engine's first ``number`` steps, all read beforehand."""
    shards = ShardSet.open(str(folder / "shards" / "manifest.json"))
    order = DataOrder(shards.manifest.samples_per_shard, seed=0, lanes=64, shuffle_samples=1024)
    loader = Loader(
        shards, order, CausalLM().label, num_steps=number, global_sequences=SEQUENCES, micro_sequences=SEQUENCES
    )
    return [batch for step in loader.steps() for batch in step.micro_batches]


def block_seconds(marks: list[float], case: dict[str, Any]) -> list[float]:
    """Seconds a step in each block but the first."""
    return [(end - begin) / case["block_steps"] for begin, end in pairwise(marks[1:])]


def naive_loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
    inputs = CausalLM().model_inputs(batch, student)
    logits = student(**inputs).logits.flatten(0, 1)
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits.flatten(0, 1)
    kl = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, dim=-1),
        F.log_softmax(teacher_logits / TEMPERATURE, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return kl * TEMPERATURE**2 + F.cross_entropy(logits, batch.labels.flatten())


def no_teacher_loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
    logits = student(**CausalLM().model_inputs(batch, student)).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


def fused_loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
    model_inputs = CausalLM().model_inputs(batch, student)
    with torch.no_grad():
        teacher_hidden = teacher.model(**model_inputs).last_hidden_state.flatten(0, 1)[batch.label_rows]
    hidden = student.model(**model_inputs).last_hidden_state.flatten(0, 1)[batch.label_rows]
    inputs = FusedInputs(
        labels=batch.labels.flatten()[batch.label_rows],
        all_labelled=True,
        targets=DenseTargets(teacher_hidden, Head(teacher.lm_head.weight, None)),
        losses=[LogitLoss("forward_kl", 1.0, TEMPERATURE), LogitLoss("cross_entropy", 1.0)],
        num_ids=student.config.vocab_size,
        with_metrics=False,
        with_gradient=True,
    )
    return fused_head_loss(hidden, Head(student.lm_head.weight, None), inputs)[0] / hidden.shape[0]


def trl_way(case: dict[str, Any]) -> dict[str, Any]:
    """TRL off-policy: its trainer, its loss, with the tokens already in the data set."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    folder = Path(case["folder"])
    models = [transformers.LlamaForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher")]
    tokens = torch.cat([batch.input_ids for batch in batches(folder, num_steps(case))])
    marks = [time.perf_counter()]

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % case["block_steps"] == 0:
                marks.append(time.perf_counter())

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([sample["input_ids"] for sample in samples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "prompts": ids[:, :1]}

    trainer = GKDTrainer(
        model=models[0],
        teacher_model=models[1],
        args=GKDConfig(
            output_dir=str(folder / "trl"),
            lmbda=0.0,
            beta=0.0,
            temperature=TEMPERATURE,
            max_steps=num_steps(case),
            per_device_train_batch_size=SEQUENCES,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            logging_steps=case["block_steps"],
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        data_collator=collate,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=[Marks()],
    )
    trainer.train()
    return {"step_seconds": block_seconds(marks, case)}
