"""A run of two ranks leaves nothing in shared memory."""

from __future__ import annotations

from pathlib import Path

from tests.launching import Job, finish

RANK = """
import glob, os
import torch
os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]  # as the deepspeed launcher does
from engine.meeting import meet
from engine.rendezvous import read_ranks
from engine.zero import init_distributed
init_distributed(meet(read_ranks()), 60.0)
torch.distributed.barrier()
assert "deepspeed_allreduce_buffer" in open("/proc/self/maps").read(), "DeepSpeed's buffers are called otherwise now"
assert not glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{os.environ['MASTER_PORT']}_*")
numbers = torch.full((1000,), float(os.environ["RANK"]) + 1.0)
torch.distributed.all_reduce(numbers)
assert numbers.eq(3.0).all()
torch.distributed.destroy_process_group()
"""


def test_the_buffers_have_no_name_once_all_ranks_have_them(tmp_path: Path) -> None:
    finish(Job(["-c", RANK], 2, tmp_path))
