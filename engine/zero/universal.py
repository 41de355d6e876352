"""A checkpoint of one number of ranks in DeepSpeed's universal form, which any number of ranks can load.

universal/  zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt  zero/optimizer_state.pt  *_model_states.pt
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

from engine.data.atomic import move_into_place, sync_folder
from engine.errors import CheckpointError
from engine.zero.loading import TAG, weights_only

UNIVERSAL = "universal"
"""The converted folder in a checkpoint; with .tmp behind it, one that is not whole."""


def convert(checkpoint: Path) -> None:
    """Put ``universal`` into ``checkpoint`` unless it is there. For one rank alone; its files must have been checked.

    What a killed conversion left is thrown away. Raises CheckpointError when the disk has too little room or the
    checkpoint is not of ZeRO stage 1, 2 or 3.
    """
    final, temporary = checkpoint / UNIVERSAL, checkpoint / f"{UNIVERSAL}.tmp"
    if final.is_dir():
        return
    shutil.rmtree(temporary, ignore_errors=True)
    _check_room(checkpoint)
    try:
        temporary.mkdir()
        with weights_only(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            ds_to_universal.main(
                Namespace(
                    input_folder=str(checkpoint / TAG),
                    output_folder=str(temporary / UNIVERSAL),  # it also writes a file beside this folder
                    num_extract_workers=1,  # in this process: a pool would outlive a kill and write on
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
        _sync(temporary)
        move_into_place(temporary / UNIVERSAL, final)
    except (OSError, RuntimeError, KeyError, AssertionError, ValueError) as problem:
        raise CheckpointError(f"{checkpoint}: cannot be converted for another number of ranks: {problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def padding_has_a_step(groups: Sequence[Sequence[Any]]) -> Iterator[None]:
    """``groups`` are lists of parameters. A rank that holds nothing but padding of a flat group maps none of them, and
    DeepSpeed, which takes the group's step from those it maps, fails there. Inside, such a rank maps the first one, but
    no value of it.
    """
    stand_ins = [group[0] for group in groups if group and all(p._hp_mapping is None for p in group)]
    for parameter in stand_ins:
        nowhere, nothing = fragment_address(numel=0, start=0), torch.empty(0)
        parameter._hp_mapping = tensor_fragment(nothing, nowhere, nothing, nowhere, {}, {}, False, 0, {})
    try:
        yield
    finally:
        for parameter in stand_ins:
            parameter._hp_mapping = None


def _check_room(checkpoint: Path) -> None:
    """The parameters are first written in pieces and then put together, so both lie there for a while."""
    needed = 2 * sum(path.stat().st_size for path in (checkpoint / TAG).glob("*.pt"))
    free = shutil.disk_usage(checkpoint).free
    if needed > free:
        raise CheckpointError(
            f"{checkpoint}: going on with another number of ranks needs {needed / 1e6:,.1f} MB to convert it, the disk "
            f"has {free / 1e6:,.1f} MB free; free some space, or start with the number of ranks that wrote it"
        )


def _sync(folder: Path) -> None:
    for inside, _, names in os.walk(folder):
        for name in names:
            sync_folder(Path(inside, name))
        sync_folder(Path(inside))
