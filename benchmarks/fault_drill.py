"""Faults at random moments, restarts, and what share of the time was training: beside what theory allows.

Two ranks under the deepspeed launcher train a small Llama (that of ``kill_resume.py``). Every MEAN seconds on average
something happens to the job: a rank is killed or stopped for good, the launcher is killed and leaves its ranks behind,
or a scheduler asks it to end. Then the same command is started again, as Slurm's requeue would. At the end the steps
that count must have the losses of an undisturbed run, bit for bit: no batch trained on twice, none left out.

    effective   useful steps x seconds of an undisturbed step / wall time
    theory      (1 - stall / interval - interval / (2 MEAN)) x MEAN / (MEAN + recovery): Young, "A first order
                approximation to the optimum checkpoint interval" (1974), with the time that a restart takes

``recovery`` is from the fault to the first new step, its redone steps not counted; ``interval`` is the time between
checkpoints. Theory takes stall, recovery and the time between faults as measured.

    python benchmarks/fault_drill.py --output benchmarks/results/fault_drill.json
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from kill_resume import Job, make_parts, newest_step
from measuring import leave_nothing_behind, print_table, write_json

KINDS = ("rank killed", "rank stopped", "launcher killed", "asked to end")


class Fault(NamedTuple):
    kind: str
    uptime_seconds: float
    """since the first new step"""
    gone_seconds: float | None
    """until the job had ended; None where it was not waited for"""
    recovery_seconds: float
    lost_steps: int


def main() -> None:
    arguments = parse_arguments()
    leave_nothing_behind()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_parts(folder)
        faults, wall_seconds, num_steps = drill(folder, arguments)
        arguments.steps, arguments.wait_seconds = num_steps, arguments.wait_seconds + 2.0 * arguments.seconds
        with Job(folder, "calm", arguments) as calm:
            calm.run_to_end()
        figures = evaluate(folder, faults, wall_seconds, num_steps, arguments)
    show(faults, figures)
    settings = {"seconds": arguments.seconds, "mean": arguments.mean, "checkpoint_every": arguments.checkpoint_every}
    write_json(arguments.output, {"settings": settings, **figures, "faults": [fault._asdict() for fault in faults]})
    if not figures["identical"]:
        raise SystemExit("the surviving steps differ from those of an undisturbed run")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--folder", help="put the runs there (default: the system's temporary folder)")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the drill")
    parser.add_argument("--mean", type=float, default=30.0, help="seconds of training between two faults, on average")
    parser.add_argument("--checkpoint-every", type=int, default=20)
    parser.add_argument("--timeout-seconds", type=float, default=8.0, help="cluster.timeout_seconds")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--port", type=int, default=29_500, help="of the rendezvous, the same for all jobs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds")
    parser.add_argument("--wait-seconds", type=float, default=180.0, help="no wait is longer than this")
    arguments = parser.parse_args()
    arguments.steps = 1_000_000
    return arguments


def drill(folder: Path, arguments: argparse.Namespace) -> tuple[list[Fault], float, int]:
    """The faults, the seconds from the first step to the end, and the steps of the last checkpoint."""
    chance = random.Random(arguments.seed)
    faults: list[Fault] = []
    job = Job(folder, "drill", arguments)
    job.wait_until(lambda: job.reached(1), "the first step", 0.02)
    begin = up = time.perf_counter()
    old: list[Job] = []
    while time.perf_counter() - begin < arguments.seconds:
        time.sleep(max(2.0, chance.expovariate(1.0 / arguments.mean)))
        kind, moment, reached = chance.choice(KINDS), time.perf_counter(), job.last_step()
        gone = hit(job, kind, chance)
        old.append(job)
        resumed = newest_step(job.run_folder)
        job = Job(folder, "drill", arguments)
        job.wait_until(lambda job=job, step=resumed: is_new(job, step), "a new step", 0.02)
        now = time.perf_counter()
        faults.append(Fault(kind, moment - up, gone, now - moment, max(0, reached - resumed)))
        print(f"{now - begin:6.0f} s  {faults[-1]}", flush=True)
        up = now
    wall = time.perf_counter() - begin
    job.terminate()
    job.wait_until(lambda: not job.processes(), "the last checkpoint")
    for each in [*old, job]:
        each.end()
        each.launcher.wait()
    return faults, wall, newest_step(job.run_folder)


def hit(job: Job, kind: str, chance: random.Random) -> float | None:
    """Seconds until the job had ended. Ranks without a launcher are not waited for: the next launch replaces them."""
    if kind == "launcher killed":
        job.kill("launcher")
        return None
    if kind == "asked to end":
        job.terminate()
    else:
        number = signal.SIGKILL if kind == "rank killed" else signal.SIGSTOP
        job.kill(f"rank {chance.randrange(2)}", number)
    return job.wait_until(lambda: not job.processes(), "the job to end", 0.02)


def is_new(job: Job, resumed_step: int) -> bool:
    """Whether this launch has done a step: it has cut the records of later ones when it took over."""
    events = job.run_folder / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().split("\n")[:-1]] if events.exists() else []
    starts = [line for line in lines if line["event"] in ("started", "resumed")]
    return bool(starts) and starts[-1]["unix_seconds"] > job.began and job.last_step() > starts[-1]["step"]


def evaluate(
    folder: Path, faults: list[Fault], wall_seconds: float, num_steps: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    calm, drilled = (records(folder, name) for name in ("calm", "drill"))
    losses = {record["step"]: record["loss/objective"] for record in drilled if "loss/objective" in record}
    expected = {record["step"]: record["loss/objective"] for record in calm if "loss/objective" in record}
    surviving = {step: loss for step, loss in losses.items() if step <= num_steps}
    step_seconds = statistics.median(r["throughput/step_seconds"] for r in calm if "throughput/step_seconds" in r)
    stalls = [r["seconds/checkpoint_stall"] for r in calm if "seconds/checkpoint_stall" in r]
    between = statistics.mean(fault.uptime_seconds for fault in faults)
    recovery = statistics.mean(fault.recovery_seconds for fault in faults)
    interval = arguments.checkpoint_every * step_seconds
    at_work = 1.0 - statistics.mean(stalls) / interval - interval / (2.0 * between)
    theory = at_work * between / (between + recovery)
    effective = num_steps * step_seconds / wall_seconds
    return {
        "effective": effective,
        "theory": theory,
        "ratio": effective / theory,
        "mean_recovery_seconds": recovery,
        "longest_recovery_seconds": max(fault.recovery_seconds for fault in faults),
        "mean_seconds_between_faults": between,
        "step_seconds": step_seconds,
        "stall_seconds": statistics.mean(stalls),
        "wall_seconds": wall_seconds,
        "steps": num_steps,
        "repeated_steps": sum(fault.lost_steps for fault in faults),
        "skipped_steps": num_steps - len(surviving),
        "identical": surviving == expected,
    }


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def show(faults: list[Fault], figures: dict[str, Any]) -> None:
    rows = []
    for kind in KINDS:
        mine = [fault for fault in faults if fault.kind == kind]
        gone = [fault.gone_seconds for fault in mine if fault.gone_seconds is not None]
        if mine:
            recovery = statistics.mean(fault.recovery_seconds for fault in mine)
            lost = statistics.mean(fault.lost_steps for fault in mine)
            ended = f"{statistics.mean(gone):.1f}" if gone else "-"
            rows.append([kind, len(mine), ended, f"{recovery:.1f}", f"{lost:.1f}"])
    print_table(["fault", "times", "job gone, s", "recovery, s", "steps lost"], rows)
    print(
        f"effective {figures['effective']:.3f}, theory {figures['theory']:.3f}: {figures['ratio']:.2f} of it; "
        f"{figures['steps']:,} steps, {figures['repeated_steps']:,} repeated, {figures['skipped_steps']} skipped; "
        f"identical to an undisturbed run: {'yes' if figures['identical'] else 'NO'}"
    )


if __name__ == "__main__":
    main()
