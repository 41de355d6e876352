"""From the sums of some steps to a record: means a target position, rates and times, with their names."""

from __future__ import annotations

import math
import time
from typing import Protocol

import torch

from engine.data.client import Traffic
from engine.losses.block import METRICS
from engine.losses.objective import Objective, StepContext
from engine.state import TrainState


class EngineFigures(Protocol):
    """What a record asks of the student's engine."""

    @property
    def grad_norm(self) -> float: ...
    @property
    def loss_scale(self) -> float: ...
    @property
    def num_skipped_steps(self) -> int: ...


class RecordMaker:
    """Counts what the steps since the last record held.

    ``flops_per_token`` are those of training a token; ``peak_flops`` the device's, None where it is not known.
    ``over_vocabulary``: perplexities say something.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        num_steps: int,
        world_size: int,
        device: torch.device,
        flops_per_token: float,
        peak_flops: float | None,
        has_labels: bool = True,
        over_vocabulary: bool = True,
    ) -> None:
        self._objective, self._has_labels, self._over_vocabulary = objective, has_labels, over_vocabulary
        self._num_steps, self._world_size, self._device = num_steps, world_size, device
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._labels = self._tokens = self._metric_labels = 0
        self._traffic, self._has_server = Traffic(), False
        self._first_step = self._num_steps_counted = 0
        self._began = self._mark = 0.0

    def begin(self, state: TrainState) -> None:
        self._first_step = state.step
        self._began = self._mark = time.perf_counter()

    def add(self, context: StepContext) -> None:
        self._labels += context.num_labels
        self._tokens += context.num_tokens
        self._metric_labels += context.num_labels if context.with_metrics else 0
        self._num_steps_counted += 1

    def add_traffic(self, traffic: Traffic) -> None:
        """What all ranks asked of shard servers."""
        self._traffic = Traffic(*map(sum, zip(self._traffic, traffic)))
        self._has_server = self._has_server or traffic.num_requests > 0

    def make(
        self, state: TrainState, sums: list[float], seconds: dict[str, float], engine: EngineFigures, epoch: float
    ) -> dict[str, float]:
        """The record of the steps since the last one; waits for the device."""
        record = self._losses(sums)
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        per_second = self._tokens / elapsed
        record |= {
            "train/grad_norm": engine.grad_norm,
            "train/loss_scale": engine.loss_scale,
            "train/skipped_steps": engine.num_skipped_steps,
            "throughput/tokens_per_second": per_second,
            "throughput/tokens_per_second_per_device": per_second / self._world_size,
            "throughput/step_seconds": elapsed / self._num_steps_counted,
            "memory/peak_bytes": _peak_memory_bytes(self._device),
            "data/bad_samples": state.num_bad_samples,
            "data/epoch": epoch,
            "time/elapsed_seconds": state.elapsed_seconds,
            "time/eta_seconds": (now - self._began) / (state.step - self._first_step) * (self._num_steps - state.step),
        }
        if self._peak_flops:
            record["throughput/mfu"] = per_second * self._flops_per_token / (self._world_size * self._peak_flops)
        record |= {f"seconds/{name}": value / self._num_steps_counted for name, value in seconds.items()}
        if self._has_server:
            record |= {
                "data/requests": self._traffic.num_requests,
                "data/retries": self._traffic.num_retries,
                "data/bytes_read": self._traffic.num_bytes,
                "data/seconds_waiting_for_server": self._traffic.waiting_milliseconds / 1000,
            }
        self._traffic = Traffic()
        self._labels = self._tokens = self._metric_labels = self._num_steps_counted = 0
        return record

    def _losses(self, sums: list[float]) -> dict[str, float]:
        objective = self._objective
        counts = [self._tokens if tokens else self._labels for tokens in objective.over_tokens]
        counts[-len(METRICS) :] = [self._metric_labels] * len(METRICS)
        mean = {name: total / max(1, count) for name, total, count in zip(objective.metric_names, sums, counts)}
        weighted = [mean[f"{name}_weighted"] for name in objective.names]
        record = {"loss/objective": sum(weighted)}
        record |= {f"loss/{name}": value for name, value in mean.items() if name not in METRICS}
        if self._has_labels:
            record["student/loss"] = mean["student_nll"]
        if self._has_labels and self._over_vocabulary:
            record["student/perplexity"] = _perplexity(mean["student_nll"])
        # a cache may know the teacher's first choice and neither its loss nor its distribution at temperature 1
        known = {
            "teacher/perplexity": _perplexity(mean["teacher_nll"])
            if mean["teacher_nll"] and self._has_labels and self._over_vocabulary
            else None,
            "kl/temperature_1": mean["kl_temperature_1"] or None,
            "agreement/top1": mean["agreement"] if any(mean[name] for name in METRICS[1:]) else None,
        }
        return record | {name: value for name, value in known.items() if value is not None}

    @staticmethod
    def headline(record: dict[str, float]) -> dict[str, str]:
        """What the progress bar shows."""
        fields = {"loss": f"{record['loss/objective']:.3f}"}
        if "student/perplexity" in record:
            fields["ppl"] = f"{record['student/perplexity']:.1f}"
        if "agreement/top1" in record:
            fields["agree"] = f"{record['agreement/top1']:.1%}"
        fields["tok/s"] = f"{record['throughput/tokens_per_second']:,.0f}"
        return fields


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if not math.isnan(loss) else loss


def _peak_memory_bytes(device: torch.device) -> int:
    """Of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
