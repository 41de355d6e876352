"""The process group, and the ops that ranks of one CPU host share memory with."""

from __future__ import annotations

import fcntl
import os
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import PrefixStore, distributed_c10d

from engine.meeting import Meeting


def init_distributed(meeting: Meeting, timeout_seconds: float) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and give this rank's device.

    ``timeout_seconds`` limits an exchange of gradients or weights.
    """
    build_ops()
    ranks, timeout = meeting.ranks, timedelta(seconds=timeout_seconds)
    _limit_new_groups(timeout)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if not torch.distributed.is_initialized():  # a lone rank keeps its group, to train again
        torch.distributed.init_process_group(
            backend,
            store=PrefixStore("group", meeting.store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" and ranks.world_size > 1 else None,
        )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # every rank would say that the op is built
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    if device.type == "cpu":
        _forget_shared_buffers()
    return device


def _limit_new_groups(timeout: timedelta) -> None:
    """DeepSpeed exchanges gradients and weights in groups that it makes without a time-out; torch then takes its own,
    half an hour, from these names."""
    distributed_c10d.default_pg_timeout = timeout
    if isinstance(distributed_c10d.default_pg_nccl_timeout, timedelta):
        distributed_c10d.default_pg_nccl_timeout = timeout


def _forget_shared_buffers() -> None:
    """Take away the names of DeepSpeed's all-reduce buffers, 66 MiB a rank, which it leaves in /dev/shm for good.

    A later run on the same port would also begin with what they last held. Once every rank has them mapped, the
    memory lives as long as the ranks do.
    """
    torch.distributed.barrier()
    name = "_".join([str(os.getuid()), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"]])
    Path("/dev/shm", f"deepspeed_allreduce_buffer_{name}").unlink(missing_ok=True)


def build_ops() -> None:
    """Compile what the ranks of one CPU host share memory with: a minute the first time, nothing later.

    torch guards a build with a file that a killed rank leaves behind, for others to wait on for ever. Our lock ends
    with its holder, so whoever has it may remove that file.
    """
    if get_accelerator().device_name() != "cpu":
        return
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stillhouse.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / builder.name / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)
