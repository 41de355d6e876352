"""Held-out loss of students from cached targets: how much of what the whole distribution gives over labels they give.

A tiny pre-training, several seeds: the same fresh student under cross entropy alone, under the whole distribution of
an online teacher, and under caches. The gap closed is (cross entropy - way) / (cross entropy - whole), of the means
over the seeds; the error is that of the mean over the seeds' own ratios. Each run is launch/distill.py in a process of
its own, and goes on where it was stopped.

    python benchmarks/cache_quality.py --config run.yaml --output-folder FOLDER [--seeds 3] [key.path=value ...]

The run needs teacher.model, a student from a config, and evaluation.manifest; its losses are replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import ROOT, leave_nothing_behind, print_table, write_json

WHOLE, LABELS = "whole distribution", "labels alone"
FORWARD_KL = '[{"kind": "forward_kl"}]'
WAYS: dict[str, list[str]] = {
    LABELS: ["teacher.kind=none", "teacher.model=null", 'losses=[{"kind": "cross_entropy"}]'],
    WHOLE: ["teacher.kind=online", f"losses={FORWARD_KL}"],
    "sampled, 50 draws": ["cache.codec.kind=sampled"],
    "sampled, 45 draws": ["cache.codec.kind=sampled", "cache.codec.num_draws=45"],
    "sampled, 42 draws": ["cache.codec.kind=sampled", "cache.codec.num_draws=42"],
    "sampled, 20 draws": ["cache.codec.kind=sampled", "cache.codec.num_draws=20"],
    "top_k 50, renormalised": ["cache.codec.kind=top_k", "cache.codec.k=50", "teacher.tail=renormalise"],
    "top_k 12, renormalised": ["cache.codec.kind=top_k", "cache.codec.k=12", "teacher.tail=renormalise"],
    "top_k 12, bucket": ["cache.codec.kind=top_k", "cache.codec.k=12", "teacher.tail=bucket"],
}


def main() -> None:
    arguments = parse_arguments()
    leave_nothing_behind()
    folder = arguments.output_folder.resolve()
    chosen = {name: WAYS[name] for name in WAYS if name in (LABELS, WHOLE) or name in arguments.ways}
    bytes_a_position = {name: make_cache(name, settings, arguments, folder) for name, settings in chosen.items()}
    losses: dict[str, list[float]] = {name: [] for name in chosen}
    for seed in range(arguments.seeds):
        for name, settings in chosen.items():
            losses[name].append(train(name, settings, seed, arguments, folder))
            print(f"seed {seed}, {name}: {losses[name][-1]:.4f}", flush=True)
    rows = [figures(name, losses, bytes_a_position[name]) for name in chosen]
    header = ["way", "bytes", "loss", "gap closed", "error"]
    print_table(header, [[r["way"], *(f"{r[k]:.3f}" for k in ("bytes", "loss", "gap_closed", "error"))] for r in rows])
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
    write_json(arguments.output, {"settings": settings, "losses": losses, "ways": rows})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--output-folder", type=Path, required=True, help="for caches and runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS)[2:], default=list(WAYS)[2:])
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_intermixed_args()


def cached(name: str, settings: list[str], folder: Path) -> list[str]:
    if name in (LABELS, WHOLE):
        return settings
    cache = folder / "caches" / name.replace(",", "").replace(" ", "-")
    return ["teacher.kind=cached", f"teacher.cache={cache}", f"losses={FORWARD_KL}", *settings]


def make_cache(name: str, settings: list[str], arguments: argparse.Namespace, folder: Path) -> float:
    """Bytes a position of the cache as it lies on disk."""
    if name in (LABELS, WHOLE):
        return math.nan
    words = cached(name, settings, folder)
    run("cache_teacher.py", arguments, words, folder)
    path = Path(next(word for word in words if word.startswith("teacher.cache=")).partition("=")[2])
    manifest = json.loads((path / "manifest.json").read_text())
    return manifest["num_bytes"] / sum(each["header"]["num_positions"] for each in manifest["sidecars"])


def train(name: str, settings: list[str], seed: int, arguments: argparse.Namespace, folder: Path) -> float:
    run_name = f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    results = folder / "runs" / run_name / "results.json"
    if not results.is_file():
        words = [*cached(name, settings, folder), f"run.name={run_name}", f"run.output={folder / 'runs'}"]
        run("distill.py", arguments, [*words, f"run.seed={seed}", "evaluation.control=null"], folder)
    models = json.loads(results.read_text())["models"]
    return float(next(model["loss"] for model in models if model["role"] == "student"))


def run(script: str, arguments: argparse.Namespace, words: list[str], folder: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch" / script),
        "--config",
        arguments.config,
        *arguments.overrides,
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def figures(name: str, losses: dict[str, list[float]], num_bytes: float) -> dict[str, Any]:
    def closed(label: float, way: float, whole: float) -> float:
        return (label - way) / (label - whole)

    mean = {way: statistics.mean(values) for way, values in losses.items()}
    each = [closed(*values) for values in zip(losses[LABELS], losses[name], losses[WHOLE])]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    gap = closed(mean[LABELS], mean[name], mean[WHOLE])
    return {"way": name, "bytes": num_bytes, "loss": mean[name], "gap_closed": gap, "error": error}


if __name__ == "__main__":
    main()
