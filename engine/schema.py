"""The types that travel between the parts. They hold data and no behaviour beyond moving it to a device.

Shape legend, used in all docstrings and suffixes: B sequences, T positions, N selected positions, V vocabulary,
C classes, K kept ids, H student hidden, G teacher hidden, L layers, D documents packed into one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # parsing a config must not import torch
    from collections.abc import Callable

    import numpy as np
    import torch
    from torch import Tensor

IGNORE = -100
"""Label of a position that has none."""

Part = TypeVar("Part")


def map_tensors(part: Part, change: Callable[[Tensor], Tensor]) -> Part:
    """A dataclass of this module with ``change`` done to each of its tensors, also to those of parts inside it."""
    import torch

    def changed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if is_dataclass(value):
            return map_tensors(value, change)
        if isinstance(value, tuple):
            return tuple(changed(each) for each in value)
        return value

    return replace(part, **{field.name: changed(getattr(part, field.name)) for field in fields(part)})  # type: ignore[type-var, arg-type]


@dataclass(frozen=True)
class Annotation:
    """What a sample of a labelled task has beside its tokens."""

    labels: np.ndarray
    """[T], [1] or [2] by the task: 0 where there is none, 1 for one that is not known, then 2 + the label's index"""
    piece_tokens: np.ndarray
    """[1 or 2] tokens of the first text and of the second, each with its special tokens; sums to T"""
    example: bytes = b""
    """JSON that scoring needs, or nothing"""


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
    annotation: Annotation | None = None

    @property
    def name(self) -> str:
        return f"{self.shard}/{self.key}"

    @staticmethod
    def damaged(shard: str, index: int) -> Sample:
        """Stands in for sample number ``index`` of a shard, which cannot be read."""
        import numpy as np

        nothing = np.empty(0, np.uint16)
        return Sample(shard, f"record {index}", nothing, nothing, sound=False)


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
    piece_ids: Tensor | None = None
    """[B, T] int64: 0 for the first text of a labelled sample and for padding, 1 for the second"""
    examples: tuple[bytes, ...] = ()
    """of each sequence what its sample holds for scoring"""
    cached: SparseTargets | CachedStates | Unanswered | None = None
    """what a cache holds for the positions with a label"""

    @property
    def num_labels(self) -> int:
        return self.label_rows.numel()

    @property
    def num_tokens(self) -> int:
        return self.token_rows.numel()

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``; from pinned memory the copy does not block."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch with its tensors in pinned memory."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


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
class LayerAttention:
    """What a layer's attention computes with, after rotary positions."""

    query: Tensor
    """[B, heads, T, d]"""
    key: Tensor
    """[B, heads or fewer, T, d]"""
    value: Tensor
    """[B, heads or fewer, T, d]"""
    scale: float
    """of the products of queries and keys"""
    causal: bool
    """positions attend to themselves and those before them alone"""


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's last hidden states at the selected rows, with its head: logits are formed chunk by chunk."""

    hidden: Tensor
    """[N, G]"""
    head: Head
    hidden_states: tuple[Tensor, ...] = ()
    """[B, T, G] for the embeddings (0) and each layer, when a term asks for them"""
    attention: tuple[LayerAttention, ...] = ()
    """of the layers that terms ask for, in their order"""
    even_pairs: Tensor | None = None
    """[P, 2] ids whose probabilities are evened out before they are learned"""


@dataclass(frozen=True)
class LogitTargets:
    """The teacher's own logits where there are few classes."""

    logits: Tensor
    """[N, C]: C classes, or T places of which one is to be found"""
    hidden_states: tuple[Tensor, ...] = ()
    """[B, T, G] for the embeddings (0) and each layer, when a term asks for them"""
    attention: tuple[LayerAttention, ...] = ()
    """of the layers that terms ask for, in their order"""


@dataclass(frozen=True)
class CachedStates:
    """The teacher's states read from a cache: DenseTargets but for the head, which lies on the device already."""

    hidden: Tensor
    """[N, G]"""
    hidden_states: tuple[Tensor, ...] = ()
    """[B, T, G] each"""


class Unanswered:
    """A batch of which a cache lacks samples: what the teacher must be told to answer for them. Stays on the host."""

    def __init__(self, samples: list[Sample], labelled: tuple[np.ndarray, np.ndarray], records: list[Any]) -> None:
        self.samples, self.labelled, self.records = samples, labelled, records


@dataclass(frozen=True)
class SparseTargets:
    """What a cache keeps of the teacher's distribution at the selected rows, at one temperature."""

    ids: Tensor
    """[N, K] int64; a row is filled up with an id of its own and weight 0"""
    weights: Tensor
    """[N, K] fp32"""
    top_ids: Tensor
    """[N] int64: the teacher's likeliest id"""
    nll: Tensor
    """[N] fp32: the teacher's -log p of the label, as the mean over the sample"""
    entropy: Tensor
    """[N] fp32: the teacher's entropy, likewise"""
    temperature: float
    tail: Tensor | None = None
    """[N] fp32: mass of all other ids; None for samples, whose weights stand for all ids"""
    handling: str | None = None
    """what becomes of the tail: bucket, renormalise or residual_to_label"""
    importance: bool = False
    """the weights of a row sum to 1 only in the mean"""


Targets = DenseTargets | LogitTargets | SparseTargets


@dataclass(frozen=True)
class Answer:
    """What a model's forward gives the terms."""

    head_input: Tensor | None = None
    """[B, T, H] states that go into the vocabulary head, for tasks over the vocabulary"""
    logits: Tensor | None = None
    """[N, C] where there are few classes: at the rows with a label"""
    hidden_states: tuple[Tensor, ...] = ()
    """[B, T, H] for the embeddings (0) and each layer, when a term asks for them"""
    attention: tuple[LayerAttention, ...] = ()
    """of the layers that terms ask for, in their order"""
