"""A teacher whose layers are computed by several ranks together, as Megatron-LM cuts them (arXiv 1909.08053).

Of a matrix in a ``colwise`` place a rank keeps some rows, so it computes some heads or inner units; of the ``rowwise``
one that follows it keeps the columns which take those, and the ranks add their results up. Which matrix is which is
the model's own plan (``tp_plan`` of transformers). Embeddings, norms and the head stay whole. Only for the forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from engine.errors import ConfigError
from engine.losses.reading import Reads
from engine.schema import Batch, DenseTargets, LogitTargets
from engine.teacher.online import OnlineTeacher

COLWISE, ROWWISE = "colwise", "rowwise"
WHOLE = frozenset({"embedding_rowwise", "embedding_colwise", "replicated_with_grad_allreduce", "replicate"})
"""Styles of what every rank keeps whole here: embeddings, and norms whose plan only speaks of gradients."""


def check_tensor_parallel(config: PreTrainedConfig, tp_size: int) -> None:
    """Raises ConfigError when ``tp_size`` does not divide the heads or the inner units of a model."""
    text = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(text, name, None)
        if isinstance(number, int) and number % tp_size:
            fitting = [size for size in range(2, number + 1) if number % size == 0][:4]
            raise ConfigError(
                f"teacher.tp_size = {tp_size} does not divide the teacher's {name} = {number}; "
                f"that takes {', '.join(map(str, fitting)) or 'none'}. placement: zero3 cuts any model"
            )


class Cut(NamedTuple):
    """A matrix of which each rank keeps a part."""

    module: nn.Linear
    style: str


def plan_cuts(model: PreTrainedModel) -> list[Cut]:
    """Raises ConfigError for a model without a plan, or with a part that cannot be cut here."""
    cuts = []
    for name, module, style in _planned(model):
        if style in WHOLE:
            continue
        if style not in (COLWISE, ROWWISE) or not isinstance(module, nn.Linear):
            raise ConfigError(
                f"teacher.placement: tensor_parallel cannot cut {name} of {type(model).__name__} "
                f"({type(module).__name__}, {style}); use placement: zero3, which cuts any model"
            )
        cuts.append(Cut(module, style))
    if not cuts:
        raise ConfigError(
            f"teacher.placement: tensor_parallel: transformers has no plan (tp_plan) for {type(model).__name__}; use "
            "placement: zero3, which cuts any model"
        )
    return cuts


def cut_layers(model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """Keep this rank's part of each matrix that the model's plan names; in place, where they lie. Raises ConfigError
    as ``plan_cuts`` does."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for module, style in plan_cuts(model):
        module.weight = _part(module.weight, 0 if style == COLWISE else 1, rank, size)
        if style == ROWWISE:
            module.forward = _summed(module, group)  # type: ignore[method-assign, assignment]
        elif module.bias is not None:
            module.bias = _part(module.bias, 0, rank, size)


def _planned(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module | nn.Parameter, str]]:
    """(name, module or parameter, style); the head, which is kept whole, is left out."""
    head = model.get_output_embeddings()
    parts: dict[str, nn.Module | nn.Parameter] = {**dict(model.named_modules()), **dict(model.named_parameters())}
    for pattern, style in (model.tp_plan or {}).items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for name, part in parts.items():
            if part is not head and expression.fullmatch(name):
                yield name, part, style


def _part(parameter: Tensor, dim: int, rank: int, size: int) -> nn.Parameter:
    """A copy, so that the whole may go."""
    part = parameter.detach().chunk(size, dim)[rank]
    return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)


def _summed(module: nn.Linear, group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """The forward of a rowwise matrix: the bias is added once, to the sum over the ranks."""

    def forward(states: Tensor) -> Tensor:
        total = nn.functional.linear(states, module.weight)
        dist.all_reduce(total, group=group)
        return total if module.bias is None else total + module.bias

    return forward


class GroupTeacher(OnlineTeacher):
    """Asked by the ranks of a group at the same time, each about a micro-batch of its own.

    They exchange their inputs, 3 B T integers, run all micro-batches one after another, and each keeps the answer to
    its own: so the memory of the pass is that of one micro-batch. Collective over the group; all micro-batches of a
    turn have one shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Reads,
        *,
        group: dist.ProcessGroup,
        **wanted: Any,
    ) -> None:
        """``wanted`` as of an OnlineTeacher."""
        super().__init__(model, task, **wanted)
        self._group = group

    @torch.inference_mode()
    def targets_for(self, batch: Batch, rows: Tensor) -> DenseTargets | LogitTargets:
        own = dist.get_rank(self._group)
        targets = None
        for number, other in enumerate(self._exchanged(batch)):
            answer = self.reader.read(other)
            if number == own:
                targets = self._targets(answer, rows)
        assert targets is not None
        return targets

    def _exchanged(self, batch: Batch) -> list[Batch]:
        """The inputs of each rank of the group. Whether one is packed is not asked, which would make the host wait."""
        inputs = torch.stack([batch.input_ids, batch.position_ids, batch.segment_ids.to(batch.input_ids.dtype)])
        found = [torch.empty_like(inputs) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(found, inputs, group=self._group)
        return [
            replace(batch, input_ids=ids, position_ids=positions, segment_ids=segments, packed=True)
            for ids, positions, segments in (each.unbind() for each in found)
        ]
