"""Reading what DeepSpeed wrote without running anything that a file asks for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from pickle import UnpicklingError

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from engine.digests import Digests
from engine.errors import CheckpointError

TAG = "zero"
"""DeepSpeed's name for its folder in a checkpoint."""
CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
"""All that DeepSpeed's files hold besides tensors and plain values. Making one of them does nothing else."""
torch.serialization.add_safe_globals(CLASSES)
FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Iterator[None]:
    """Every torch.load inside, DeepSpeed's own too, makes tensors, plain values and CLASSES, or raises
    CheckpointError.

    DeepSpeed asks for weights_only=False in many places; torch has a variable that overrules all of them.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    os.environ[FORCE] = "1"
    try:
        yield
    except UnpicklingError as problem:
        wanted = re.search(r"GLOBAL (\S+)", str(problem))  # the rest of the text tells how to read it all the same
        reason = f"it asks for {wanted[1]}" if wanted else "it is no file of tensors"
        raise CheckpointError(f"a checkpoint's file was refused, since {reason}") from None
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def consolidate(checkpoint: Path, recorded: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint of any ZeRO stage and world size, by name, on the CPU.

    ``recorded`` has the sha256 of its files. Raises CheckpointError for one that has another.
    """
    folder = checkpoint / TAG
    Digests(checkpoint, recorded).check_all(sorted(folder.glob("*.pt")))
    with weights_only(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if not any(folder.glob("*_optim_states.pt")):  # stage 0 keeps whole weights, and DeepSpeed's tool knows it not
            whole = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
            return {name: tensor.float() for name, tensor in whole.items()}
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
