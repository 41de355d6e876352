"""Would this run fit, and how long would it take? Answered on any machine, without a GPU and without weights.

    python launch/preflight.py --config run.yaml --world-size 16 --device-memory 80GB --device H100 [key.path=value ...]
    python launch/preflight.py --config run.yaml --cache-trial 64 [key.path=value ...]
    python launch/preflight.py --config run.yaml --world-size 16 --cluster [--hostfile HOSTS] [key.path=value ...]

The second asks the teacher for some samples, here and now, and foretells its cache: how large, and how long it takes.
The third starts a rank on each host, in a Slurm allocation or over a hostfile, compares the hosts and measures them.
Shapes come from the models' configs, samples from the manifest (or --samples and --sequence-tokens before there are
shards). Exit codes: 0 it fits, 1 it does not, 2 an error of yours to mend.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.log import run_main

if TYPE_CHECKING:
    from engine.config.run import TeacherSection
    from engine.cost import ParameterCount
    from engine.planning import Machine, Plan, Planner

_UNITS = {"": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30}


def parse_bytes(text: str) -> int:
    """80GB, 80GiB or a number of bytes. Raises ConfigError."""
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text)
    if not found or found[2].upper() not in _UNITS:
        raise ConfigError(f"--device-memory {text}: expected a size such as 80GB or 79.6GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run YAML")
    parser.add_argument("--world-size", type=int, help="ranks, one a device (default: 1)")
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--device-memory", help="of one device, such as 80GB; the verdict needs it")
    parser.add_argument("--device", help="its name, such as H100; the hours need it")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak FLOPs reached (default: 0.35)")
    parser.add_argument("--samples", type=int, help="samples of the data, instead of the manifest's")
    parser.add_argument("--sequence-tokens", type=int, help="tokens of a sample, instead of the manifest's")
    parser.add_argument(
        "--cache-trial",
        type=int,
        metavar="N",
        help="ask the teacher for N samples here, and foretell the cache's size and the hours to make it",
    )
    parser.add_argument("--cluster", action="store_true", help="compare and measure the hosts of this allocation")
    parser.add_argument("--hostfile", help="for --cluster: lines such as 'node1 slots=8', as deepspeed takes them")
    parser.add_argument(
        "--join-seconds", type=float, default=30.0, help="for --cluster: wait so long for all ranks (default: 30)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # appended by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.cluster:
        from launch.preflight_cluster import check_cluster

        return check_cluster(arguments, str(Path(__file__).resolve()))
    from engine.config.load import load_stages  # after the arguments: --help answers at once
    from engine.planning import Machine, Planner

    machine = Machine(
        arguments.accelerator,
        arguments.world_size or 1,
        parse_bytes(arguments.device_memory) if arguments.device_memory else None,
        arguments.device,
        arguments.mfu,
    )
    if arguments.cache_trial:
        print("\n".join(_trial_lines(arguments.config, arguments.overrides, arguments.cache_trial)))
        return 0
    stages = load_stages(arguments.config, arguments.overrides)
    codes = []
    for number, stage in enumerate(stages):
        if len(stages) > 1:
            print(f"{'' if number == 0 else chr(10)}Stage       {stage.run.name}")
        data = arguments.samples, arguments.sequence_tokens
        planner = Planner(arguments.config, arguments.overrides, machine, *data, stage=number)
        codes.append(_show(planner, machine))
    return max(codes)


def _show(planner: Planner, machine: Machine) -> int:
    """Print the plan and the verdict; the exit code."""
    plan = planner.plan()
    print("\n".join([*_run_lines(plan, machine), "", *_memory_lines(plan), "", *_cost_lines(plan, machine), ""]))
    if machine.memory_bytes is None:
        print("Verdict     none: give --device-memory, such as 80GB")
        return 0
    if plan.fits(machine):
        print(f"Verdict     YES, it fits: {_size(plan.device_bytes)} of {_size(machine.memory_bytes)} a device")
        return 0
    print("\n".join(_refusal_lines(plan, machine, planner.remedies())))
    return 1


def _run_lines(plan: Plan, machine: Machine) -> list[str]:
    run, batch, data = plan.run, plan.run.batch, plan.data
    ranks, micro_batches = _plural(batch.world_size, "rank"), _plural(batch.accumulation, "micro-batch", "es")
    sequences = _plural(batch.micro_sequences, "sequence")
    step_tokens = batch.global_sequences * data.sequence_tokens
    lines = [
        f"Run         {run.config.run.name}, {run.config.task.kind}, on {ranks} of {machine.kind}",
        f"Batch       {batch.global_sequences:,} sequences a step",
        f"              = {ranks} x {micro_batches} x {sequences}",
        f"              = {step_tokens:,} tokens, {data.sequence_tokens:,} a sequence",
        f"Length      {run.num_steps:,} steps = {_count(plan.num_tokens)} tokens",
        f"              = {plan.num_epochs:.2f} epochs of {data.num_samples:,} samples",
        f"Student     {_model(plan.student)}, {run.precision}",
    ]
    if plan.teacher is not None:
        lines.append(f"Teacher     {_model(plan.teacher)}, {run.teacher_precision}, {_placement(run.config.teacher)}")
    return [*lines, f"ZeRO        stage {run.zero_stage}, {plan.deepspeed_name}"]


def _placement(teacher: TeacherSection) -> str:
    parts = [teacher.placement + (f" over {teacher.tp_size}" if teacher.tp_size else "")]
    parts += ["weights on the host"] if teacher.offload == "cpu" else []
    parts += [teacher.quantize] if teacher.quantize != "none" else []
    return ", ".join(parts)


def _memory_lines(plan: Plan) -> list[str]:
    largest = max(part.num_bytes for part in plan.parts)
    lines = ["Memory of one device"]
    for name, num_bytes in plan.parts:
        bar = "#" * round(24 * num_bytes / largest)
        lines.append(f"  {name:<34}{_size(num_bytes):>10}  {bar}".rstrip())
    lines.append(f"  {'total':<34}{_size(plan.device_bytes):>10}")
    if plan.host_bytes:
        lines.append(f"  {'offloaded to host memory, a rank':<34}{_size(plan.host_bytes):>10}")
    return lines


def _cost_lines(plan: Plan, machine: Machine) -> list[str]:
    keep, flops = plan.run.config.checkpoint.keep, plan.flops_per_token * plan.num_tokens
    lines = [
        f"Checkpoint  {_size(plan.checkpoint_bytes)}, {keep} kept: {_size(keep * plan.checkpoint_bytes)} on disk",
        f"Compute     {_count(plan.flops_per_token)} FLOPs a token, {_count(flops)} in all",
    ]
    hours = plan.hours(machine)
    if hours is None:
        why = f"the peak of {machine.device} is not known" if machine.device else "give --device, such as H100"
        return [*lines, f"Time        unknown: {why}"]
    devices = f"{machine.world_size} x {machine.device} at {machine.mfu:.0%} of peak"
    return [*lines, f"Time        about {_hours(hours)} on {devices}"]


def _refusal_lines(plan: Plan, machine: Machine, remedies: list[tuple[str, Plan]]) -> list[str]:
    assert machine.memory_bytes is not None
    lines = [f"Verdict     NO: {_size(plan.device_bytes)} needed, {_size(machine.memory_bytes)} a device"]
    for change, changed in remedies:
        answer = "fits" if changed.fits(machine) else "still too much"
        lines.append(f"  {_size(changed.device_bytes):>10}  {answer:<15} {change}")
    if not any(changed.fits(machine) for _, changed in remedies):
        lines.append("  No single change is enough: use several, more devices, or a smaller model.")
    return lines


def _trial_lines(path: str, overrides: list[str], num_samples: int) -> list[str]:
    import torch

    from engine.capture import try_capture
    from engine.config.load import load_config

    config = load_config(path, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trial = try_capture(config, device, num_samples)
    rounds = f" in {config.task.mask_rounds} rounds of masks" if config.task.kind == "masked_lm" else ""
    positions = trial.num_tokens * trial.positions_a_token
    return [
        f"Trial       {_plural(trial.num_records, 'record')}, codec {config.cache.codec.kind}, on one {device.type}",
        f"              {trial.tokens_a_second:,.0f} tokens/s, {trial.bytes_a_position:.1f} bytes a position",
        f"Cache       {_count(trial.num_tokens)} tokens{rounds}, {_count(positions)} positions with a target",
        f"              = {_size(round(trial.cache_bytes))}",
        f"Time        about {_hours(trial.hours)} for one job like this one; jobs share the work evenly",
    ]


def _model(counted: ParameterCount) -> str:
    return f"{_count(counted.total)} parameters ({_count(counted.in_layers)} in layers)"


def _plural(number: int, word: str, ending: str = "s") -> str:
    return f"{number:,} {word}{ending if number != 1 else ''}"


def _count(number: float) -> str:
    """1.34 G, the way people write large counts."""
    for power, letter in zip(range(24, 0, -3), "YZEPTGMk"):
        if number >= 10.0**power:
            return f"{number / 10.0**power:.3g} {letter}"
    return f"{number:.3g}"


def _size(num_bytes: int) -> str:
    """Bytes in powers of ten, as memory is sold."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _hours(hours: float) -> str:
    if hours < 1.0:
        return f"{max(1.0, hours * 60.0):.0f} min"
    return f"{hours:.1f} hours" if hours < 72.0 else f"{hours / 24:.1f} days"


if __name__ == "__main__":
    run_main(main)
