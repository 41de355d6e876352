"""The engine's whole step against bare loops and against TRL, on the same models and the same real text.

Llama, 8 layers to 4, width 256, 4 heads, SwiGLU of 683, the GPT-2 vocabulary (50,257, tied head), 4 x 512 tokens a
step, fp32, one process: at least 134 MFLOP a token. KL at temperature 2 plus cross entropy; TRL's GKDTrainer has only
its KL (lmbda 0, beta 0). The ways run by turns, each time in a process of its own, so peak memory is the whole
process's. A turn is cut into blocks of a few steps; the first is warm-up. Needed of the engine: 1.7 times TRL's
tokens a second in 0.45 of its memory, and 1.05 times the bare fused loop's time.

    python benchmarks/step_time.py --text FILE.txt --tokenizer GPT2_FOLDER --output benchmarks/results/step_time.json

TRL: ``pip install --no-deps --target FOLDER trl`` and ``--trl FOLDER``; without it that way is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import (
    ROOT,
    first_to_die,
    give_result,
    in_child,
    leave_nothing_behind,
    peak_process_bytes,
    print_table,
    write_json,
)
from torch import Tensor
from torch.nn import functional as F

from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.data.shards import ShardSet
from engine.losses.fused import FusedInputs, LogitLoss, fused_head_loss
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
NEEDED_OVER_TRL, NEEDED_MEMORY, NEEDED_OVERHEAD = 1.7, 0.45, 1.05


def main() -> None:
    arguments = parse_arguments()
    if arguments.case is not None:
        case = json.loads(arguments.case)
        torch.set_num_threads(case["threads"])
        first_to_die()
        begin = time.process_time()
        result = {ENGINE: engine_way, TRL: trl_way}.get(case["way"], bare_way)(case)
        give_result({"peak_bytes": peak_process_bytes(), "cpu_seconds": time.process_time() - begin} | result)
        return
    leave_nothing_behind()
    ways = arguments.ways or [ENGINE, FUSED, NAIVE, NO_TEACHER, *([TRL] if arguments.trl else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_parts(folder, arguments)
        turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for turn in range(arguments.turns):
            for way in ways:
                case = {name: getattr(arguments, name) for name in ("blocks", "block_steps", "threads")}
                case |= {"way": way, "folder": str(folder), "name": f"turn{turn}"}
                environment = {"OMP_NUM_THREADS": str(arguments.threads)}
                if way == TRL:
                    environment["PYTHONPATH"] = str(arguments.trl)
                turns[way].append(in_child(__file__, case, environment))
                print(f"turn {turn + 1}, {way}: {best_rate(turns[way][-1:]):,.0f} tokens/s", flush=True)
    floor = floor_flops_per_token()
    show(turns, floor, products_gigaflops(arguments.threads))
    settings = {"llama": LLAMA, "sequences": SEQUENCES, "tokens": TOKENS, "block_steps": arguments.block_steps}
    write_json(arguments.output, {"settings": settings, "floor_flops_per_token": floor, "turns": turns})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="real text, documents separated by blank lines")
    parser.add_argument("--tokenizer", type=Path, help="folder of the GPT-2 tokenizer")
    parser.add_argument("--trl", type=Path, help="folder with trl in it")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=2, help="measured blocks a turn")
    parser.add_argument("--block-steps", type=int, default=4, help="steps a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ways", nargs="+", choices=[ENGINE, NAIVE, FUSED, NO_TEACHER, TRL])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is None and not (arguments.text and arguments.tokenizer):
        parser.error("--text and --tokenizer are needed")
    return arguments


def make_parts(folder: Path, arguments: argparse.Namespace) -> None:
    """Shards of the text, and a teacher and a student with random weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    for name, layers in (("teacher", TEACHER_LAYERS), ("student", STUDENT_LAYERS)):
        torch.manual_seed(layers)
        config = transformers.LlamaConfig(
            **LLAMA,
            num_hidden_layers=layers,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = ["--task", "causal_lm", "--input", arguments.text, "--tokenizer", folder / "teacher", "--workers", "1"]
    words += ["--sequence-tokens", str(TOKENS), "--output", folder / "shards"]
    subprocess.run([sys.executable, ROOT / "data_tools" / "build_shards.py", *words], check=True)


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
        "teacher": {"kind": "online", "model": str(folder / "teacher")},
        "data": {"manifest": str(folder / "shards" / "manifest.json")},
        "batch": {"global_sequences": SEQUENCES, "micro_sequences": SEQUENCES},
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


def floor_flops_per_token() -> float:
    """Two a weight of a matrix forward, six with the backward pass; attention itself not counted."""
    width, inner, vocab = LLAMA["hidden_size"], LLAMA["intermediate_size"], 50_257
    layer = 4 * width**2 + 3 * width * inner
    return 2.0 * (TEACHER_LAYERS * layer + vocab * width) + 6.0 * (STUDENT_LAYERS * layer + vocab * width)


def products_gigaflops(threads: int) -> float:
    """What this machine does on the head's product alone, the largest of the step."""
    torch.set_num_threads(threads)
    hidden, weight = torch.randn(SEQUENCES * TOKENS, LLAMA["hidden_size"]), torch.randn(50_257, LLAMA["hidden_size"])
    logits = torch.empty(hidden.shape[0], weight.shape[0])
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        torch.mm(hidden, weight.t(), out=logits)
        seconds.append(time.perf_counter() - begin)
    return 2.0 * hidden.numel() * weight.shape[0] / min(seconds) / 1e9


def best_rate(turns: list[dict[str, Any]]) -> float:
    """Tokens a second in the fastest block."""
    return SEQUENCES * TOKENS / min(second for turn in turns for second in turn["step_seconds"])


def median_rate(turns: list[dict[str, Any]]) -> float:
    return SEQUENCES * TOKENS / statistics.median(second for turn in turns for second in turn["step_seconds"])


def peak(turns: list[dict[str, Any]]) -> float:
    return max(turn["peak_bytes"] for turn in turns) / 2**20


def show(turns: dict[str, list[dict[str, Any]]], floor: float, products: float) -> None:
    rows = []
    for way, figures in turns.items():
        gigaflops = f"{best_rate(figures) * floor / 1e9:.0f}" if way not in (NO_TEACHER,) else "-"
        rates = [f"{best_rate(figures):,.0f}", f"{median_rate(figures):,.0f}"]
        rows.append([way, *rates, f"{peak(figures):,.0f}", gigaflops])
    print_table(["way", "best tokens/s", "median", "peak MiB", "GFLOP/s of the floor"], rows)
    print(f"floor {floor / 1e6:.0f} MFLOP a token; the head's product alone runs at {products:.0f} GFLOP/s")
    ours = turns.get(ENGINE)
    if ours and TRL in turns:
        trl = turns[TRL]
        print(f"over TRL: {best_rate(ours) / best_rate(trl):.2f} times the tokens/s (needed {NEEDED_OVER_TRL}), "
              f"{peak(ours) / peak(trl):.2f} of the memory (needed {NEEDED_MEMORY})")  # fmt: skip
    if ours and FUSED in turns:
        print(f"over the bare fused loop: {best_rate(turns[FUSED]) / best_rate(ours):.3f} times the time "
              f"(needed {NEEDED_OVERHEAD})")  # fmt: skip
    if ours:
        phases = {key.removeprefix("seconds/"): value for key, value in ours[-1]["phases"].items()}
        print("seconds a step in the engine: " + ", ".join(f"{name} {value:.3f}" for name, value in phases.items()))


if __name__ == "__main__":
    main()
