"""Device memory of a run by part, from shapes alone. Tests hold it against real engines and real forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.config.resolve import ResolvedRun
from engine.config.run import RunConfig
from engine.config.terms import AnyTerm, LogitTerm, Ramp
from engine.losses.fused import CHUNK_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class StateBytes:
    """What DeepSpeed keeps for the student on one device from step to step, and its host memory when offloaded."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 master weights and AdamW's two moments"""
    buffers: int
    """communication buckets, and under stage 3 the layers gathered at a time"""
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers


def student_state_bytes(num_parameters: int, run: ResolvedRun) -> StateBytes:
    """Bytes on one device for P parameters over W ranks.

    With b bytes a weight, g a gradient (g = b unless data_types.grad_accum_dtype is fp32), as measured on
    DeepSpeed 0.19: stage 0 (b + g + 8) P, and 4 P more for the master weights of 16-bit training; stages 1 and 2
    b P + (g + 12) P / W; stage 3 (b + g + 12) P / W. Stage 1 in bf16 with fp32 sums is another optimizer of
    DeepSpeed's, which keeps the gradients whole in both: (2 b + 4) P + 12 P / W.
    """
    size, world = VALUE_BYTES[run.precision], run.batch.world_size
    zero = run.deepspeed.get("zero_optimization", {})
    gradient = 4 if run.deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32" else size
    share = -(-num_parameters // world)
    stage = run.zero_stage
    weights = size * (share if stage == 3 else num_parameters)
    gradients = gradient * (share if stage >= 1 else num_parameters)
    if stage == 1 and gradient > size:
        gradients = (gradient + size) * num_parameters
    master = 0 if stage == 0 and size == 4 else 4
    optimizer = (8 + master) * (share if stage >= 1 else num_parameters)
    host = 0
    if _offloaded(zero, "offload_optimizer"):
        optimizer, gradients, host = 0, 0, optimizer + 4 * share
    if _offloaded(zero, "offload_param"):
        weights, host = 0, host + weights
    return StateBytes(weights, gradients, optimizer, _bucket_bytes(num_parameters, size, stage, zero, world), host)


def _offloaded(zero: dict[str, Any], key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"


def _bucket_bytes(num_parameters: int, size: int, stage: int, zero: dict[str, Any], world_size: int) -> int:
    """Buckets in flight: DeepSpeed's defaults are 5e8 values each, and overlap_comm keeps two."""
    if stage == 0 or (world_size == 1 and stage < 3):
        return 0
    bucket = min(int(zero.get("reduce_bucket_size", 5e8)), num_parameters)
    num_buckets = 2 if zero.get("overlap_comm", stage == 3) else 1
    if stage < 3:
        gather = min(int(zero.get("allgather_bucket_size", 5e8)), num_parameters)
        return size * max(num_buckets * bucket, gather)
    live = int(zero.get("stage3_max_live_parameters", 1e9)) + int(zero.get("stage3_prefetch_bucket_size", 5e7))
    return size * (num_buckets * bucket + min(live, num_parameters))


def activation_bytes(
    model: PreTrainedModel, precision: str, micro_sequences: int, sequence_tokens: int, gradient_checkpointing: bool
) -> int:
    """Bytes that autograd keeps of one forward pass of ``model``, on the meta device, up to the head.

    Not a formula: the model runs with these shapes, and what it saves is added up. Attention
    counts as a fused kernel unless the model's own code is eager. With gradient checkpointing only the input of each
    layer is kept, and one layer is recomputed at a time.
    """
    size = VALUE_BYTES[precision]
    kept = _saved_bytes(model, precision, micro_sequences, sequence_tokens)
    if not gradient_checkpointing:
        return kept
    config = model.config.get_text_config()
    inputs = config.num_hidden_layers * micro_sequences * sequence_tokens * config.hidden_size * size
    return inputs + kept // config.num_hidden_layers


def _saved_bytes(model: PreTrainedModel, precision: str, micro_sequences: int, sequence_tokens: int) -> int:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.use_cache = False
    model.train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    shape = micro_sequences, sequence_tokens
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, sequence_tokens, sequence_tokens, dtype=dtype, device="meta")  # 4D: no look at its values
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _without_head(model), _fused_attention(), hooks:
        model(input_ids=ids, attention_mask=mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@contextmanager
def _without_head(model: PreTrainedModel) -> Iterator[None]:
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    own_forward = head.forward
    head.forward = lambda state: state
    try:
        yield
    finally:
        head.forward = own_forward


class _FusedAttention(torch.autograd.Function):
    """Saves what a flash kernel saves: q, k, v, the output and a log-sum-exp a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *sequences, heads, rows, _ = query.shape
        # laid out as the kernels do, so that joining the heads copies nothing
        output = query.new_empty(*sequences, rows, heads, value.shape[-1]).transpose(-2, -3)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise AssertionError("shapes only")


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would take the plain path, which keeps T x T scores that no GPU kernel keeps."""
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _FusedAttention.apply(
        query, key, value
    )
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def logit_arrays(terms: Sequence[AnyTerm], kind: str, *, sparse: bool = False) -> int:
    """[C, V] fp32 arrays alive at once, counted on the real loss with its metrics, which are at temperature 1.

    On a CPU the temporaries go in blocks that do not count beside the logits themselves. ``sparse``: of the teacher
    no array is formed.
    """
    compared = [term for term in terms if isinstance(term, LogitTerm)]
    temperatures = {str(t.temperature) if isinstance(t.temperature, Ramp) else t.temperature for t in compared}
    if sparse:
        return 3 if kind == "cpu" else 4 + 2 * len(temperatures - {1.0})
    if kind == "cpu":
        return 3 if compared else 2
    if not compared:
        return 3
    logarithms = any(term.kind in ("reverse_kl", "js", "skew_kl") for term in compared)
    return 8 + 4 * len(temperatures - {1.0}) + 2 * logarithms


def head_loss_bytes(
    config: RunConfig, *, num_rows: int, head: Tensor, teacher_width: int | None, precision: str, kind: str
) -> int:
    """The fused loss at its peak: the fp32 gradient of the head [V, H], gradients and states of N rows, a chunk."""
    vocab_size, width = head.shape
    size = VALUE_BYTES[precision]
    sparse = config.teacher.kind == "cached" and teacher_width is None
    arrays = logit_arrays(config.losses, kind, sparse=sparse)
    chunk_rows = min(num_rows, max(16, CHUNK_BYTES[kind] // (4 * vocab_size)))
    states = num_rows * (2 * width + (teacher_width or 0)) * size
    return (4 + size) * vocab_size * width + states + arrays * 4 * chunk_rows * vocab_size
