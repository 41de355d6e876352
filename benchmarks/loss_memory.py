"""Peak memory and time of the head and its loss: full logits through autograd against the fused pass over chunks.

Both do forward and backward of KL at temperature 2 plus cross entropy from the same states and heads. Memory is that
over the inputs, one fresh process a case; time is taken by turns in one process, beside the bare matrix products that
neither way can do without. Needed at V = 152k, N = 4,096: a tenth of the plain way's memory; flat in N; no more time;
gradients within 1e-6 of float64, also under a loss scale and accumulation.

    python benchmarks/loss_memory.py --output benchmarks/results/loss_memory.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import (
    PeakMemory,
    available_bytes,
    by_turns,
    first_to_die,
    give_result,
    in_child,
    leave_nothing_behind,
    print_table,
    write_json,
)
from torch import Tensor
from torch.nn import functional as F

from engine.losses.block import LogitLoss
from engine.losses.fused import CHUNK_BYTES, FusedInputs, fused_head_loss
from engine.schema import DenseTargets, Head

TEMPERATURE = 2.0
PLAIN_COPIES = 7
"""The [N, V] fp32 tensors that live at the plain way's peak."""
NEEDED_MEMORY, NEEDED_GROWTH, NEEDED_TIME, NEEDED_ERROR = 0.10, 1.10, 1.0, 1e-6
LOSS_SCALE, ACCUMULATION = 65_536.0, 4


class Problem(NamedTuple):
    """One micro-batch's states and labels, and the two heads."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor


def main() -> None:
    arguments = parse_arguments()
    if arguments.case is not None:
        case = json.loads(arguments.case)
        torch.set_num_threads(case["threads"])
        first_to_die()
        give_result({"memory": memory_case, "time": time_case, "error": error_case}[case["measure"]](case))
        return
    leave_nothing_behind()
    sizes = [(vocab, rows) for vocab in arguments.vocab for rows in arguments.rows]
    common = {"width": arguments.width, "threads": arguments.threads}
    memory: dict[str, dict[str, Any]] = {}
    times: dict[str, dict[str, list[float]]] = {}
    for vocab, rows in sizes:
        case = common | {"vocab": vocab, "rows": rows}
        require_memory(vocab, rows)
        memory[size_name(vocab, rows)] = {
            way: in_child(__file__, case | {"measure": "memory", "way": way})["peak_bytes"]
            for way in ("plain", "fused")
        }
        if not arguments.no_time:
            times[size_name(vocab, rows)] = in_child(
                __file__, case | {"measure": "time", "repeats": arguments.repeats, "seconds": arguments.seconds}
            )
    errors = in_child(__file__, common | {"measure": "error", "vocab": min(arguments.vocab), "rows": 256})
    show(memory, times, errors, arguments)
    settings = common | {"temperature": TEMPERATURE, "chunk_bytes": CHUNK_BYTES["cpu"]}
    write_json(
        arguments.output, {"settings": settings, "peak_bytes": memory, "seconds": times, "relative_errors": errors}
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096], help="positions with a label")
    parser.add_argument("--width", type=int, default=512, help="of the states of student and teacher")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0, help="no more turns for a case after this time")
    parser.add_argument("--no-time", action="store_true", help="measure memory and errors only")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def size_name(vocab: int, rows: int) -> str:
    return f"V={vocab} N={rows}"


def require_memory(vocab: int, rows: int) -> None:
    needed = PLAIN_COPIES * 4 * vocab * rows + 2**30
    free = available_bytes()
    if not torch.cuda.is_available() and free < needed:
        raise SystemExit(
            f"{size_name(vocab, rows)}: the plain way may take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free; "
            "wait for more or give smaller --vocab or --rows"
        )


def make_problem(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> Problem:
    """Logits with a spread of about 2, so that both distributions have a head and a tail."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows, vocab, width = case["rows"], case["vocab"], case["width"]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(device, dtype)

    scale = 2.0 / width**0.5
    return Problem(
        normal(rows, width).requires_grad_(),
        normal(vocab, width, scale=scale).requires_grad_(),
        normal(rows, width),
        normal(vocab, width, scale=scale),
        torch.randint(vocab, (rows,)).to(device),
    )


def plain_loss(problem: Problem) -> Tensor:
    """As it is written everywhere."""
    logits = F.linear(problem.hidden, problem.weight)
    with torch.no_grad():
        teacher_logits = F.linear(problem.teacher_hidden, problem.teacher_weight)
    kl = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, dim=-1),
        F.log_softmax(teacher_logits / TEMPERATURE, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return kl * TEMPERATURE**2 + F.cross_entropy(logits, problem.labels, reduction="sum")


def fused_loss(problem: Problem) -> Tensor:
    inputs = FusedInputs(
        labels=problem.labels,
        all_labelled=True,
        targets=DenseTargets(problem.teacher_hidden, Head(problem.teacher_weight, None)),
        losses=[LogitLoss("forward_kl", 1.0, TEMPERATURE), LogitLoss("cross_entropy", 1.0)],
        num_ids=problem.weight.shape[0],
        with_metrics=False,
        with_gradient=True,
    )
    return fused_head_loss(problem.hidden, Head(problem.weight, None), inputs)[0]


LOSSES: dict[str, Callable[[Problem], Tensor]] = {"plain": plain_loss, "fused": fused_loss}


def train_once(problem: Problem, loss: Callable[[Problem], Tensor]) -> None:
    problem.hidden.grad = problem.weight.grad = None
    loss(problem).backward()
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def matrix_products(problem: Problem) -> None:
    """The four products of the fused way at its shapes, and nothing between them."""
    rows, vocab = problem.hidden.shape[0], problem.weight.shape[0]
    d_weight = torch.zeros_like(problem.weight)
    chunk_rows = max(16, CHUNK_BYTES[problem.hidden.device.type] // (4 * vocab))
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits = problem.hidden[chunk] @ problem.weight.t()
        _ = problem.teacher_hidden[chunk] @ problem.teacher_weight.t()
        _ = logits @ problem.weight
        d_weight.addmm_(logits.t(), problem.hidden[chunk])
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()


def memory_case(case: dict[str, Any]) -> dict[str, Any]:
    train_once(make_problem(case | {"rows": 16, "vocab": 64}), LOSSES[case["way"]])  # what the libraries keep
    problem = make_problem(case)
    peak = PeakMemory(problem.hidden.device)
    train_once(problem, LOSSES[case["way"]])
    return {"peak_bytes": peak.take()}


def time_case(case: dict[str, Any]) -> dict[str, Any]:
    problem = make_problem(case)
    ways: dict[str, Callable[[], None]] = {name: _bound(problem, loss) for name, loss in LOSSES.items()}
    ways["products"] = lambda: matrix_products(problem)
    return by_turns(ways, case["repeats"], case["seconds"])


def _bound(problem: Problem, loss: Callable[[Problem], Tensor]) -> Callable[[], None]:
    return lambda: train_once(problem, loss)


def error_case(case: dict[str, Any]) -> dict[str, Any]:
    """Norm of the gradient's error over the norm of the float64 gradient: at once, and scaled and accumulated."""
    exact = make_problem(case, torch.float64)
    plain_loss(exact).backward()
    errors: dict[str, Any] = {}
    for name, scale, parts in (("at once", 1.0, 1), ("scaled and accumulated", LOSS_SCALE, ACCUMULATION)):
        ours = make_problem(case)
        for part in torch.arange(case["rows"]).chunk(parts):
            fewer = Problem(ours.hidden[part], ours.weight, ours.teacher_hidden[part], *ours[3:4], ours.labels[part])
            (fused_loss(fewer) * (scale / parts)).backward()
        for tensor in ("hidden", "weight"):
            gradient = getattr(ours, tensor).grad.double() * (parts / scale)
            expected = getattr(exact, tensor).grad
            errors[f"{tensor}, {name}"] = ((gradient - expected).norm() / expected.norm()).item()
    return errors


def show(
    memory: dict[str, dict[str, int]],
    times: dict[str, dict[str, list[float]]],
    errors: dict[str, float],
    arguments: argparse.Namespace,
) -> None:
    rows = [
        [size, f"{peak['plain'] / 2**20:,.0f}", f"{peak['fused'] / 2**20:,.0f}", f"{peak['fused'] / peak['plain']:.3f}"]
        for size, peak in memory.items()
    ]
    print_table(["peak memory over the inputs", "plain, MiB", "fused, MiB", "ratio"], rows)
    for vocab in arguments.vocab:
        few, many = min(arguments.rows), max(arguments.rows)
        growth = memory[size_name(vocab, many)]["fused"] - 4 * arguments.width * (many - few)
        print(f"V={vocab}: N={many} over N={few}, less the dH rows: "
              f"{growth / memory[size_name(vocab, few)]['fused']:.3f}")  # fmt: skip
    print(f"needed: at most {NEEDED_MEMORY} at the largest size, growth at most {NEEDED_GROWTH}\n")
    table = []
    for size, seconds in times.items():
        least = {way: min(values) for way, values in seconds.items()}
        ratios = [fused / plain for fused, plain in zip(seconds["fused"], seconds["plain"])]
        vocab, count = (int(part.partition("=")[2]) for part in size.split())
        gigaflops = 8 * vocab * count * arguments.width / 1e9
        ratio, to_products = least["fused"] / least["plain"], least["products"] / least["fused"]
        row = [f"{least[way]:.2f}" for way in ("plain", "fused", "products")]
        row += [f"{ratio:.3f}", f"{statistics.median(ratios):.3f}"]
        table.append([size, *row, f"{gigaflops / least['fused']:.0f}", f"{to_products:.2f}"])
    if table:
        header = ["least seconds", "plain", "fused", "products", "ratio", "median ratio", "GFLOP/s", "of products"]
        print_table(header, table)
        print(f"needed: a ratio of at most {NEEDED_TIME}\n")
    print_table(
        ["gradient against float64, fused fp32", "relative error"], [[k, f"{v:.1e}"] for k, v in errors.items()]
    )
    print(f"needed: at most {NEEDED_ERROR}")


if __name__ == "__main__":
    main()
