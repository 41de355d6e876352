"""What each mechanism of a recipe is worth: the same runs without it, with equal steps, data and seeds.

    python benchmarks/ablations.py --masked masked.yaml --staged staged.yaml --output-folder FOLDER

``--masked`` is a masked_lm run with init: teacher_layers and mask_smoothing; ``--staged`` a run in stages with an
unfreezing and a projection_learning_rate. Both need held-out data. Each row is the whole recipe against the recipe
without one thing:

    layer copy        a student of the same shape with fresh weights
    smoothing         mask_smoothing 0; both scored on masks that are smoothed, so on rare tokens
    unfreezing        its stages trained whole from their first step
    projection rate   projections at the student's learning rate
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from measuring import ROOT, print_table, write_json


class Ablation(NamedTuple):
    """A mechanism, how to leave it out, and how both runs are scored."""

    name: str
    config: str
    without: list[str]
    scoring: list[str]


def main() -> None:
    arguments = parse_arguments()
    rows = []
    for ablation in ablations(arguments):
        whole, without = ([], [])
        for seed in range(arguments.seeds):
            kept = f"{Path(ablation.config).stem}-{seed}"
            train(ablation.config, kept, seed, [], arguments.output_folder)
            left = f"without-{ablation.name.replace(' ', '-')}-{seed}"
            changes = [each.replace("WHOLE", str(arguments.output_folder / kept)) for each in ablation.without]
            train(ablation.config, left, seed, changes, arguments.output_folder)
            whole.append(score(arguments.output_folder / kept, ablation.scoring))
            without.append(score(arguments.output_folder / left, ablation.scoring))
        rows.append(figures(ablation.name, whole, without))
        print(rows[-1], flush=True)
    print_table(
        ("mechanism", "measure", "with", "without", "worth"),
        [(r["name"], r["measure"], f"{r['with']:.4f}", f"{r['without']:.4f}", f"{r['worth']:+.4f}") for r in rows],
    )
    write_json(arguments.output, {"seeds": arguments.seeds, "ablations": rows})


def ablations(arguments: argparse.Namespace) -> list[Ablation]:
    found = []
    if arguments.masked:
        exponent = yaml.safe_load(Path(arguments.masked).read_text())["task"]["mask_smoothing"]
        fresh = ["student={config: WHOLE/export}", "freeze=[]"]  # what was drawn at random is not frozen
        found.append(Ablation("layer copy", arguments.masked, fresh, []))
        found.append(
            Ablation("smoothing", arguments.masked, ["task.mask_smoothing=0"], [f"task.mask_smoothing={exponent}"])
        )
    if arguments.staged:
        stages = yaml.safe_load(Path(arguments.staged).read_text())["stages"]
        thaw, projected = (
            next(i for i, stage in enumerate(stages) if wanted(stage))
            for wanted in (lambda stage: "unfreeze" in stage, lambda stage: projection_rate(stage) is not None)
        )
        ((unit, length),) = stages[thaw]["run"].items()  # num_steps or num_epochs, of each part
        parts = len(stages[thaw]["unfreeze"])
        at_once = [f"stages.{thaw}.unfreeze=null", f"stages.{thaw}.run.{unit}={parts * length}"]
        found.append(Ablation("unfreezing", arguments.staged, at_once, []))
        plain = [f"stages.{projected}.optimizer.projection_learning_rate=null"]
        found.append(Ablation("projection rate", arguments.staged, plain, []))
    return found


def projection_rate(stage: dict[str, Any]) -> float | None:
    rate: float | None = stage.get("optimizer", {}).get("projection_learning_rate")
    return rate


def train(config: str, name: str, seed: int, changes: list[str], folder: Path) -> None:
    """One run, unless it is there."""
    if (folder / name / "export").is_dir() and (folder / name / "report.html").is_file():
        return
    words = [f"run.name={name}", f"run.output={folder}", f"run.seed={seed}", "evaluation.control=null", *changes]
    call("distill.py", ["--config", config, *words])


def score(run: Path, scoring: list[str]) -> dict[str, float]:
    """The student's held-out measures."""
    if scoring:
        call("evaluate_student.py", ["--run", str(run), *scoring])
    student = next(
        each for each in json.loads((run / "results.json").read_text())["models"] if each["role"] == "student"
    )
    if student.get("scores"):
        name, value = next(iter(student["scores"]["measures"].items()))
        return {name: value}
    return {"loss": student["loss"]}


def call(script: str, words: list[str]) -> None:
    command = [sys.executable, str(ROOT / "launch" / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def figures(name: str, whole: list[dict[str, float]], without: list[dict[str, float]]) -> dict[str, Any]:
    (measure,) = whole[0]
    ours, theirs = ([each[measure] for each in runs] for runs in (whole, without))
    mean, other = statistics.mean(ours), statistics.mean(theirs)
    better = other - mean if measure == "loss" else mean - other
    return {"name": name, "measure": measure, "with": mean, "without": other, "worth": better,
            "each": list(zip(ours, theirs))}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masked", help="run YAML of a masked language model")
    parser.add_argument("--staged", help="run YAML in stages")
    parser.add_argument("--output-folder", type=Path, required=True, help="for the runs; those that are there are kept")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
