"""What a model costs in parameters and FLOPs, from its shapes alone: a model on the meta device will do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterCount:
    """Tied weights count once. ``in_layers`` leaves out embeddings and the head, as scaling laws do."""

    total: int
    in_layers: int


def count_parameters(model: PreTrainedModel) -> ParameterCount:
    """Parameters of ``model``, buffers not counted."""
    outside = _embedding_and_head(model)
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return ParameterCount(sum(sizes.values()), sum(size for key, size in sizes.items() if key not in outside))


def forward_flops_per_token(model: PreTrainedModel, sequence_tokens: int) -> float:
    """FLOPs of the forward pass up to the head: 2 a weight that multiplies, and attention over the whole sequence.

    Attention is 4 T H a layer (Q K^T and A V), not halved for a causal mask: the convention of PaLM's model FLOPs,
    arXiv 2204.02311, appendix B. Of experts only those that a token is sent to count.
    """
    outside = _embedding_and_head(model)
    config = model.config.get_text_config()
    matrices = 0.0
    for parameter in model.parameters():
        if parameter.ndim < 2 or id(parameter) in outside:
            continue
        chosen = getattr(config, "num_experts_per_tok", None) if parameter.ndim == 3 else None
        matrices += parameter.numel() * (chosen / parameter.shape[0] if chosen else 1.0)
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2.0 * matrices + 4.0 * config.num_hidden_layers * heads * head_width * sequence_tokens


def head_flops_per_position(model: PreTrainedModel) -> float:
    """FLOPs of one position's logits: 2 V H; a head of few classes counts with the layers."""
    head = model.get_output_embeddings()
    return 0.0 if head is None else 2.0 * head.weight.numel()


def training_flops_per_token(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    sequence_tokens: int,
    head_positions_fraction: float = 1.0,
    gradient_checkpointing: bool = False,
) -> float:
    """FLOPs of one training token: three forwards of the student (four when layers are recomputed), one of the teacher.

    ``head_positions_fraction`` is the share of positions whose logits are formed: about 1 for causal models, the
    masked share for masked ones. Recomputed FLOPs do not count as useful: leave them out for an MFU.
    """
    forwards = 4.0 if gradient_checkpointing else 3.0
    flops = forwards * forward_flops_per_token(student, sequence_tokens)
    flops += 3.0 * head_positions_fraction * head_flops_per_position(student)
    if teacher is not None:
        flops += forward_flops_per_token(teacher, sequence_tokens)
        flops += head_positions_fraction * head_flops_per_position(teacher)
    return flops


_PEAK_TFLOPS = {
    # name in the device's own words: (fp16 and bf16 without sparsity, fp32 without TF32)
    "B200": (2250.0, 75.0),
    "GH200": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "H800": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "A40": (149.7, 37.4),
    "RTX A6000": (154.8, 38.7),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "MI300X": (1307.0, 163.4),
}
_WITHOUT_BF16 = ("V100", "T4")


def peak_flops(device_name: str, precision: str) -> float | None:
    """The makers' dense peak of one device in FLOP/s, or None for a device or precision not in the table.

    ``device_name`` is what ``torch.cuda.get_device_name`` says, or any part that names it, such as H100.
    """
    for name, (half, single) in _PEAK_TFLOPS.items():
        if re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", device_name, re.IGNORECASE):
            if precision == "bf16" and name in _WITHOUT_BF16:
                return None
            return 1e12 * (single if precision == "fp32" else half)
    return None


def known_devices() -> tuple[str, ...]:
    """Names that ``peak_flops`` knows."""
    return tuple(_PEAK_TFLOPS)


def _embedding_and_head(model: PreTrainedModel) -> set[int]:
    found = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    return found if head is None else found | {id(parameter) for parameter in head.parameters(recurse=False)}
