"""Score the student of a complete checkpoint on held-out data, beside its teacher and its control.

    python launch/evaluate_student.py --run runs/NAME [--checkpoint STEP_FOLDER] [--manifest heldout/manifest.json]
        [--control runs/OTHER/export] [key.path=value ...]

Prints a table, and writes results.json and report.html into the run's folder. With --nearest or --pseudo-perplexity
it prints those instead, for a run or for any saved model:

    python launch/evaluate_student.py --model FOLDER --teacher FOLDER --nearest king paris
    python launch/evaluate_student.py --model FOLDER --manifest heldout/manifest.json --pseudo-perplexity
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.log import run_main, setup


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="the run's folder")
    which.add_argument("--model", help="a saved model: folder or hub id")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint's folder (default: the best, or the newest)")
    parser.add_argument("--manifest", help="held-out shards (default: the run's own)")
    parser.add_argument("--control", help="exported folder of a student trained without a teacher")
    parser.add_argument("--teacher", help="model to look at beside the student (default: the run's teacher)")
    parser.add_argument(
        "--nearest", nargs="+", metavar="WORD", help="words that the embeddings hold near each of these"
    )
    parser.add_argument(
        "--pseudo-perplexity", action="store_true", help="mask each token alone: a forward pass a token"
    )
    parser.add_argument("--max-sequences", type=int, default=64, help="for --pseudo-perplexity (default: 64)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the run's")
    arguments = parser.parse_intermixed_args()
    if arguments.model and not (arguments.nearest or arguments.pseudo_perplexity):
        parser.error("--model goes with --nearest or --pseudo-perplexity; the table is of a run: give --run")
    looks = arguments.nearest or arguments.pseudo_perplexity
    if arguments.teacher and not looks:
        parser.error("--teacher goes with --nearest or --pseudo-perplexity; for the table give teacher.model=FOLDER")
    if looks and (arguments.control or arguments.overrides):
        parser.error("--control and key.path=value are for the table, not for --nearest and --pseudo-perplexity")
    if arguments.model and arguments.checkpoint:
        parser.error("--checkpoint is one of a run: give --run")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    setup(rank=0)
    for line in look(arguments) if arguments.nearest or arguments.pseudo_perplexity else table(arguments):
        print(line)
    return 0


def table(arguments: argparse.Namespace) -> list[str]:
    from engine.finish import evaluate_run

    return evaluate_run(arguments.run, arguments.checkpoint, arguments.manifest, arguments.control, arguments.overrides)


def look(arguments: argparse.Namespace) -> list[str]:
    from engine.looking import Look

    if arguments.run is not None:
        found = Look.at_run(arguments.run, arguments.checkpoint, arguments.teacher)
    else:
        found = Look.at_models({"teacher": arguments.teacher, "student": arguments.model})
    lines = found.nearest(arguments.nearest) if arguments.nearest else []
    if arguments.pseudo_perplexity:
        lines += found.pseudo_perplexity(arguments.manifest, arguments.max_sequences)
    return lines


if __name__ == "__main__":
    run_main(main)
