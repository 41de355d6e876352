"""The student's DeepSpeed engine. The only module that imports deepspeed."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# torch's own switch: large tensors on a CPU in pages of 2 MiB, where a fault for each 4 KiB costs a tenth of a step
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# another ninja than the one that compiled an op cannot read its log, and compiles anew
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
# compiled ops belong to their environment: two that share a cache rebuild them in turns
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    os.path.join(
        sys.prefix if os.access(sys.prefix, os.W_OK) else os.path.expanduser("~/.cache/stillhouse"), "torch_extensions"
    ),
)

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from engine.config.run import OptimizerSection
from engine.errors import CheckpointError, TrainingError
from engine.schema import Head

TAG = "zero"
"""DeepSpeed's name for its folder in a checkpoint."""


def init_distributed(timeout_seconds: float) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and give this rank's device."""
    on_gpu = torch.cuda.is_available()
    build_ops()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # every rank would say that the op is built
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    if not on_gpu:
        _forget_shared_buffers()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


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


class StudentEngine:
    """DeepSpeed around the student and its objective, in the units of this project.

    DeepSpeed averages gradients over ranks and accumulation; the objective is already divided by the step's global
    number of targets, so both averages are undone here.
    """

    def __init__(
        self,
        module: nn.Module,
        config: dict[str, Any],
        optimizer: OptimizerSection,
        head_loss: nn.Module,
        head: Head,
    ) -> None:
        """``head_loss`` uses the weights of ``head``, which belong to another module: ZeRO-3 must gather them there."""
        groups = _parameter_groups(module, optimizer.weight_decay)
        own = None
        if "optimizer" not in config:
            own = torch.optim.AdamW(
                groups, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps, fused=True
            )
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, model_parameters=None if own else groups, optimizer=own, config=config
        )
        for name, buffer in module.named_buffers():  # DeepSpeed rounds rotary frequencies to the training precision
            buffer.data = buffers[name].to(buffer.device)
        self._engine.checkpoint_engine = self._writer = SnapshotWriter()
        # its scripts for every checkpoint: on a full disk copying them fails on rank 0 alone, and the others wait
        self._engine._copy_recovery_script = lambda folder: None
        self.zero_stage: int = self._engine.zero_optimization_stage()
        self._world_size = self._engine.world_size
        if self.zero_stage == 3:
            for parameter in [tensor for tensor in (head.weight, head.bias) if tensor is not None]:
                deepspeed.zero.register_external_parameter(head_loss, parameter)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        """Once a micro-batch; the weights move after the last of a step.

        Raises TrainingError when fp16 overflows even at the smallest loss scale.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        try:
            self._engine.step()
        except Exception as problem:
            if "loss scale already at minimum" not in str(problem):
                raise
            raise TrainingError(
                "fp16: the gradients overflow even at the smallest loss scale; use precision bf16 or fp32, a lower "
                "learning rate, or look for damaged data"
            ) from problem

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    @property
    def grad_norm(self) -> float:
        """Of the last step, before clipping. Reading it waits for the device."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @property
    def loss_scale(self) -> float:
        return float(getattr(self._optimizer, "cur_scale", getattr(self._optimizer, "loss_scale", 1.0)) or 1.0)

    @property
    def num_skipped_steps(self) -> int:
        return int(self._engine.skipped_steps)

    def save(self, folder: Path) -> list[Future[int]]:
        """Take a copy of all state in host memory and write it to ``folder`` in the background.

        Returns a future a file, giving its bytes, or raising CheckpointError when the disk has too little room;
        training may go on at once. Collective.
        """
        self._writer.pending = []
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        return self._writer.pending

    def load(self, folder: Path) -> None:
        """Collective. Raises CheckpointError when the files do not fit this model and this ZeRO stage."""
        try:
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        except (RuntimeError, KeyError, AssertionError, OSError, EOFError, ValueError) as problem:
            raise CheckpointError(f"{folder}: cannot be loaded into this model: {problem}") from problem
        if loaded is None:
            raise CheckpointError(f"{folder}: holds no DeepSpeed checkpoint")


class SnapshotWriter(CheckpointEngine):
    """Copies state to host memory at once and writes it from a thread, so that a save costs a memory copy."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "SnapshotWriter"
        self.pending: list[Future[int]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def save(self, state_dict: Any, path: str) -> None:
        snapshot = _to_host(state_dict, {})
        num_bytes = _tensor_bytes(snapshot)
        free = shutil.disk_usage(Path(path).parent).free
        if num_bytes > free:  # told through the future: raising here would leave the other ranks in a barrier
            refused: Future[int] = Future()
            refused.set_exception(
                CheckpointError(
                    f"{path}: needs {num_bytes / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free; "
                    "free some space and run the same command again: it resumes from the last complete checkpoint"
                )
            )
            self.pending.append(refused)
            return
        self.pending.append(self._thread.submit(_write, snapshot, path, num_bytes))

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=False)  # DeepSpeed's own classes


def _write(snapshot: Any, path: str, num_bytes: int) -> int:
    try:
        with open(path, "wb") as file:
            torch.save(snapshot, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as problem:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(
            f"{path}: could not be written ({problem}); it needs {num_bytes / 1e6:,.1f} MB"
        ) from problem
    return Path(path).stat().st_size


def _to_host(item: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    """A deep copy with every tensor in host memory; one that occurs twice is copied once."""
    if isinstance(item, Tensor):
        name = (item.device, item.data_ptr(), item.storage_offset(), tuple(item.shape), item.stride(), item.dtype)
        if name not in copies or item.numel() == 0:
            copies[name] = item.detach().to("cpu", copy=True)
        return copies[name]
    if isinstance(item, dict):
        return type(item)((key, _to_host(value, copies)) for key, value in item.items())
    if type(item) in (list, tuple, set):
        return type(item)(_to_host(value, copies) for value in item)
    return item


def _tensor_bytes(item: Any) -> int:
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, dict):
        return sum(_tensor_bytes(value) for value in item.values())
    return sum(_tensor_bytes(value) for value in item) if isinstance(item, (list, tuple, set)) else 0


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings are decayed, norms and biases are not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def consolidate(checkpoint: Path) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint of any ZeRO stage and world size, by name, on the CPU."""
    folder = checkpoint / TAG
    if not any(folder.glob("*_optim_states.pt")):  # stage 0 keeps whole weights, and DeepSpeed's tool knows it not
        whole = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
        return {name: tensor.float() for name, tensor in whole.items()}
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
