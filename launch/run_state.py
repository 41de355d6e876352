"""Where a run stands, for scripts: name=value lines.

    python launch/run_state.py --config run.yaml [key.path=value ...]

folder of the run; step of its newest complete checkpoint (0 without one; of a run in stages the sum over them);
finished: yes when the run's last launch came to its end; cached: how many sidecars its teacher's cache has. Exit code 2
for a configuration that cannot be read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.log import run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run YAML")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    from engine.checkpoint import complete_checkpoints, step_of
    from engine.config.load import load_stages
    from engine.staging import folder_of, whole_folder

    stages = load_stages(arguments.config, arguments.overrides)
    config, folder = stages[-1], whole_folder(stages)
    steps = 0
    for stage in stages:
        whole = complete_checkpoints(folder_of(stage) / "checkpoints")
        steps += step_of(whole[-1]) if whole else 0
    cached = 0
    if config.teacher.cache is not None:
        cached = num_sidecars(config.teacher.cache, config.data.manifest)
    finished = is_finished(folder_of(config))
    print(f"folder={folder}\nstep={steps}\nfinished={'yes' if finished else 'no'}")
    print(f"cached={cached}")
    return 0


def is_finished(folder: Path) -> bool:
    """Whether the last launch trained to the last step. It may have died after that, while it exported: its exit code
    tells."""
    from engine.tracking import EVENTS, read_records

    closed = [each for each in read_records(folder / EVENTS) if each.get("event") in ("started", "resumed", "closed")]
    return bool(closed) and closed[-1].get("status") == "completed"


def num_sidecars(cache: str, manifest: str) -> int:
    from engine.cache.folder import SUFFIX, cache_address
    from engine.data.address import is_remote
    from engine.data.atomic import files_below

    address = cache_address(cache, manifest)
    return 0 if is_remote(address) else sum(1 for _ in files_below(Path(address).parent, SUFFIX))


if __name__ == "__main__":
    run_main(main)
