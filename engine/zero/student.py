"""The student's DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from engine.config.run import OptimizerSection
from engine.digests import Digests, WrittenFile
from engine.errors import CheckpointError, ConfigError, TrainingError
from engine.losses.objective import PROJECTIONS
from engine.schema import Head
from engine.watch.judgement import is_lost
from engine.zero.loading import TAG, weights_only
from engine.zero.snapshot import SnapshotWriter
from engine.zero.universal import UNIVERSAL, padding_has_a_step


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
        head: Head | None,
    ) -> None:
        """``head_loss`` uses the weights of ``head``, which belong to another module: ZeRO-3 must gather them there.
        A task of few classes has no such head."""
        groups = _parameter_groups(module, optimizer)
        projection = optimizer.projection_learning_rate or optimizer.learning_rate
        self._factors = [
            projection / optimizer.learning_rate if group.pop("is_projection") else 1.0 for group in groups
        ]
        """of the learning rate, for each group of parameters"""
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
        if self.zero_stage == 3 and head is not None:
            for parameter in [tensor for tensor in (head.weight, head.bias) if tensor is not None]:
                deepspeed.zero.register_external_parameter(head_loss, parameter)

    def __call__(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        """Once a micro-batch; the weights move after the last of a step.

        Raises TrainingError when fp16 overflows even at the smallest loss scale.
        """
        for group, factor in zip(self._optimizer.param_groups, self._factors, strict=True):
            group["lr"] = learning_rate * factor
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

    def close(self) -> None:
        """Let go of the weights and what DeepSpeed keeps for them: its hooks on parameters hold the engine for ever."""
        module, optimizer = self._engine.module, self._engine.optimizer
        self._engine.destroy()
        if self.zero_stage == 3:  # its parameters stay, held by hooks that Python cannot see: without what they hold
            for parameter in module.parameters():
                parameter.data = parameter.new_empty(0)
                parameter.__dict__.clear()
            optimizer.__dict__.clear()
            self._engine.__dict__.clear()

    def save(self, folder: Path) -> list[Future[WrittenFile]]:
        """Take a copy of all state in host memory and write it to ``folder`` in the background.

        Returns a future a file, raising CheckpointError when the disk has too little room;
        training may go on at once. Collective.
        """
        self._writer.pending = []
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        return self._writer.pending

    def files(self, folder: Path) -> list[Path]:
        """What this rank reads of the checkpoint in ``folder``."""
        own = f"*zero_pp_rank_{self._engine.global_rank}_mp_rank_*.pt"
        return sorted(path for pattern in ("mp_rank_*.pt", own) for path in (folder / TAG).glob(pattern))

    def load(self, folder: Path, digests: Digests) -> None:
        """Collective. Raises CheckpointError when the files do not fit this model and this ZeRO stage."""
        self._writer.digests = digests
        _look_at_own_file_alone(self._engine)
        self._load(folder, TAG)

    def load_universal(self, folder: Path, together: Callable[[Callable[[], None]], None]) -> None:
        """From what ``convert`` made, for any number of ranks. Collective. Raises CheckpointError as ``load`` does.

        ``together`` calls its argument on every rank and raises on all of them what one raises: ranks read for
        themselves, and gather the weights after that.
        """
        self._writer.digests = None  # made by this job or one before it; nothing in it can run
        weight_decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        optimizer, read = self._optimizer, self._optimizer._load_universal_checkpoint
        groups = [*getattr(optimizer, "bit16_groups", ()), *getattr(optimizer, "bf16_groups", ())]
        optimizer._load_universal_checkpoint = lambda *words: together(lambda: read(*words))
        self._engine._config.load_universal_checkpoint = True
        try:
            with padding_has_a_step(groups):
                self._load(folder, UNIVERSAL)
        finally:
            optimizer._load_universal_checkpoint = read
            self._engine._config.load_universal_checkpoint = False
        for group, weight_decay in zip(self._optimizer.param_groups, weight_decays, strict=True):
            group["weight_decay"] = weight_decay  # under stage 3 DeepSpeed gives all groups that of the first
        for state in self._optimizer.optimizer.state.values():
            step = state.get("step")  # one for all parameters, on the CPU, and counted up by each
            if isinstance(step, Tensor):
                state["step"] = step.clone().to(state["exp_avg"].device)

    def _load(self, folder: Path, tag: str) -> None:
        try:
            with weights_only():
                loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        except (RuntimeError, KeyError, AssertionError, OSError, EOFError, ValueError) as problem:
            if is_lost(problem):
                raise
            raise CheckpointError(f"{folder}: cannot be loaded into this model: {problem}") from problem
        if loaded is None:
            raise CheckpointError(f"{folder}: holds no DeepSpeed checkpoint")


def _look_at_own_file_alone(engine: Any) -> None:
    """DeepSpeed has every rank look whether the files of all ranks are there, for the sake of an old name of theirs: on
    4,096 ranks 17 million questions to the store at a resume."""

    def names(load_dir: str, tag: str, bf16_mode: bool) -> list[str]:
        return engine._get_mp_rank_zero_checkpoint_names(
            load_dir=load_dir,
            tag=tag,
            mp_rank=engine.checkpoint_mp_rank,
            dp_world_size=engine.loaded_checkpoint_dp_world_size,
            bf16_mode=bf16_mode,
        )

    if hasattr(engine, "_get_mp_rank_zero_checkpoint_names"):
        engine._get_all_zero_checkpoint_names = names


def _parameter_groups(module: nn.Module, optimizer: OptimizerSection) -> list[dict[str, Any]]:
    """Matrices and embeddings are decayed, norms and biases are not. Projections are a group of their own where they
    have their own learning rate. Raises ConfigError when nothing is left to train."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    own = optimizer.projection_learning_rate is not None
    projections = [name for name in trained if own and name.startswith(PROJECTIONS)]
    others = [parameter for name, parameter in trained.items() if name not in projections]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": optimizer.weight_decay, "is_projection": False},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "is_projection": False},
        {"params": [trained[n] for n in projections], "weight_decay": optimizer.weight_decay, "is_projection": True},
    ]
    if not trained:
        raise ConfigError("freeze: nothing of the student is left to train; freeze less")
    return [group for group in groups if group["params"]]
