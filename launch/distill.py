"""Distil a student: the main job, on one rank or many.

    deepspeed [--num_gpus N | --hostfile F] launch/distill.py --config run.yaml [key.path=value ...]
    torchrun --nproc-per-node N launch/distill.py --config run.yaml
    python launch/distill.py --config run.yaml

Run the same command again to resume. Exit codes: 0 done or stopped by a signal with a checkpoint, 2 an error of
yours to mend, 1 anything else.
"""

from __future__ import annotations

import argparse

from engine.log import run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run YAML")
    parser.add_argument("--resume", default="auto", help="auto, never, or the folder of a checkpoint (default: auto)")
    parser.add_argument("--from-stage", metavar="NAME", help="of a run in stages: do this one and those after it again")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    from engine.distiller import Distiller  # after the arguments: --help answers at once

    Distiller(arguments.config, arguments.overrides, arguments.resume, arguments.from_stage).fit()
    return 0


if __name__ == "__main__":
    run_main(main)
