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
from step_ways import (
    ENGINE,
    FUSED,
    LLAMA,
    NAIVE,
    NO_TEACHER,
    SEQUENCES,
    STUDENT_LAYERS,
    TEACHER_LAYERS,
    TOKENS,
    TRL,
    bare_way,
    engine_way,
    trl_way,
)

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
                case |= {"overlap": arguments.overlap, "micro_batches": arguments.micro_batches}
                environment = {"OMP_NUM_THREADS": str(arguments.threads)}
                if way == TRL:  # as one who uses it finds it: the pages of 2 MiB are our engine's choice
                    environment |= {"PYTHONPATH": str(arguments.trl), "THP_MEM_ALLOC_ENABLE": "0"}
                turns[way].append(in_child(__file__, case, environment))
                print(f"turn {turn + 1}, {way}: {best_rate(turns[way][-1:]):,.0f} tokens/s", flush=True)
    floor = floor_flops_per_token()
    show(turns, floor, products_gigaflops(arguments.threads))
    settings = {"llama": LLAMA, "sequences": SEQUENCES, "tokens": TOKENS, "block_steps": arguments.block_steps}
    settings |= {"overlap": arguments.overlap, "micro_batches": arguments.micro_batches}
    write_json(arguments.output, {"settings": settings, "floor_flops_per_token": floor, "turns": turns})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="real text, documents separated by blank lines")
    parser.add_argument("--tokenizer", type=Path, help="folder of the GPT-2 tokenizer")
    parser.add_argument("--trl", type=Path, help="folder with trl in it")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=2, help="measured blocks a turn")
    parser.add_argument("--block-steps", type=int, default=5, help="steps a block")
    parser.add_argument("--overlap", action="store_true", help="the engine's teacher one micro-batch ahead, on a GPU")
    parser.add_argument("--micro-batches", type=int, default=1, choices=(1, 2, 4), help="of the engine's step")
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
