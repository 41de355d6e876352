"""Score the student of a complete checkpoint on held-out text, beside its teacher and its control.

    python launch/evaluate_student.py --run runs/NAME [--checkpoint STEP_FOLDER] [--manifest heldout/manifest.json]
        [--control runs/OTHER/export] [key.path=value ...]

Prints a table, and writes results.json and report.html into the run's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.log import run_main, setup


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="the run's folder")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint's folder (default: the newest complete one)")
    parser.add_argument("--manifest", help="held-out shards (default: the run's evaluation.manifest)")
    parser.add_argument("--control", help="exported folder of a student trained without a teacher")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the run's")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    setup(rank=0)
    from engine.finish import evaluate_run

    for line in evaluate_run(
        arguments.run, arguments.checkpoint, arguments.manifest, arguments.control, arguments.overrides
    ):
        print(line)
    return 0


if __name__ == "__main__":
    run_main(main)
