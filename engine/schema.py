"""The types that travel between the parts. They hold data and no behaviour beyond moving it to a device.

Shape legend, used in all docstrings and suffixes: B sequences, T positions, N selected positions, V vocabulary,
K kept ids, H student hidden, G teacher hidden, L layers, D documents packed into one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # parsing a config must not import torch
    import numpy as np
    import torch
    from torch import Tensor

IGNORE = -100
"""Label of a position that has none."""


@dataclass(frozen=True)
class Sample:
    """One training sequence as it lies in a shard. ``sound`` is false for the stand-in of a damaged record."""

    shard: str
    key: str
    token_ids: np.ndarray
    """[T] smallest unsigned type that fits"""
    document_tokens: np.ndarray
    """[D] tokens of each packed document, in order; sums to T"""
    sound: bool = True

    @property
    def name(self) -> str:
        return f"{self.shard}/{self.key}"


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Rows are flat indices into B*T, found while collating so that the device never has to wait."""

    input_ids: Tensor
    """[B, T] int64"""
    labels: Tensor
    """[B, T] int64; the token to predict *at* this position, or IGNORE"""
    segment_ids: Tensor
    """[B, T] int32; documents of a sequence count from 1, padding is 0"""
    position_ids: Tensor
    """[B, T] int64; restarts at each document"""
    label_rows: Tensor
    """[N] int64; positions with a label"""
    token_rows: Tensor
    """[N] int64; positions holding a real token of a sound sample"""
    packed: bool
    """some sequence holds several documents or padding: attention needs the segment ids"""
    names: tuple[str, ...]
    """shard/key of each sequence"""

    @property
    def num_labels(self) -> int:
        return self.label_rows.numel()

    @property
    def num_tokens(self) -> int:
        return self.token_rows.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``; from pinned memory the copy does not block."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("packed", "names")}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class StepBatches:
    """What one rank trains on in one optimizer step."""

    step: int
    """counts from 0"""
    epoch: float
    """epochs of the data done before this step"""
    micro_batches: tuple[Batch, ...]
    num_bad_samples: int
    """damaged records met so far in this run by this rank"""


@dataclass(frozen=True)
class Head:
    """A vocabulary projection: logits = softcap * tanh(scale * (h W^T + b) / softcap), without the tanh if no cap."""

    weight: Tensor
    """[V, H]; may have padded rows past the tokenizer's length"""
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's last hidden states at the selected rows, with its head: logits are formed chunk by chunk."""

    hidden: Tensor
    """[N, G]"""
    head: Head
    hidden_states: tuple[Tensor, ...] = ()
    """[B, T, G] for the embeddings (0) and each layer, when a term asks for them"""


Targets = DenseTargets
