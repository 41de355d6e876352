"""The vocabulary projection of any Hugging Face model: found, tapped and described, never run on a whole batch.

``tap_head`` makes the head return its input, so that the model's own forward stops short of the logits and the fused
loss gets the states h for which h W^T + b are the logits. Parameter names stay those of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.schema import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeadTap:
    """Stands in for the head's forward and keeps its last input."""

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None or getattr(head, "weight", None) is None:
            raise ConfigError(
                f"{type(model).__name__} has no output embeddings with a weight; masked_lm needs a model with an MLM "
                "head and causal_lm one with an LM head"
            )
        self.module = head
        self.state: Tensor | None = None
        self._own_forward = head.forward
        head.forward = self._keep

    def _keep(self, state: Tensor) -> Tensor:
        self.state = state
        return state

    def take(self) -> Tensor:
        """The states that went into the head in the last forward, [B, T, H]; kept no longer."""
        assert self.state is not None, "the model's forward did not reach its head"
        state, self.state = self.state, None
        return state

    def remove(self) -> None:
        """Give the head its own forward back, for good."""
        del self.module.forward

    @contextmanager
    def removed(self) -> Iterator[None]:
        """The model as it was: its forward gives logits again."""
        self.module.forward = self._own_forward
        try:
            yield
        finally:
            self.module.forward = self._keep


def describe_head(module: nn.Module, model_config: Any) -> Head:
    """The head with what the model does to its logits afterwards.

    Gemma 2 and 3 cap them (final_logit_softcapping), Cohere multiplies (logit_scale), Granite divides (logits_scaling).
    Anything else is caught by ``check_head``.
    """
    scale = float(getattr(model_config, "logit_scale", None) or 1.0)
    scale /= float(getattr(model_config, "logits_scaling", None) or 1.0)
    softcap = getattr(model_config, "final_logit_softcapping", None)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return Head(weight, getattr(module, "bias", None), scale, float(softcap) if softcap else None)


def keep_head_whole(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Turn the head's weight and bias into plain tensors of their module, copied to ``device`` in ``dtype``.

    What cuts or moves a model's parameters then passes them by, and the fused loss has them at hand. A tied embedding
    stays a parameter.
    """
    module = model.get_output_embeddings()
    for name in ("weight", "bias"):
        parameter = module._parameters.get(name)
        if parameter is not None:
            del module._parameters[name]
            setattr(module, name, parameter.detach().to(device, dtype, copy=True))


TILE_IDS = 512
"""Columns of logits that a CPU forms at once: MKL writes tiles that stay in a core's cache 1.4 times as fast."""


@torch.no_grad()
def head_logits(hidden: Tensor, head: Head, num_ids: int, out: Tensor | None = None) -> Tensor:
    """[N, H] -> [N, num_ids] fp32 logits, in ``out`` if given. Head rows past ``num_ids`` are padding: left out."""
    logits = hidden.new_empty(hidden.shape[0], num_ids, dtype=torch.float32) if out is None else out
    _product(hidden, head.weight[:num_ids], logits)
    if head.bias is not None:
        logits += head.bias[:num_ids]
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


@torch.no_grad()
def even_out(logits: Tensor, pairs: Tensor) -> None:
    """Give both ids of each pair the mean of their probabilities, in place: FairDistillation (Delobelle and Berendt,
    arXiv 2207.04546). ``logits`` [N, V], ``pairs`` [P, 2]; no id is in two pairs."""
    mean = logits[:, pairs].logsumexp(dim=2) - math.log(2.0)
    for side in (0, 1):
        logits[:, pairs[:, side]] = mean


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden weight^T in fp32: the accumulator's, not rounded to the dtype of ``hidden`` on the way."""
    if hidden.dtype != torch.float32:
        if hidden.is_cuda:
            torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
        else:
            out.copy_(torch.mm(hidden, weight.t()))
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out=out)
    else:
        for start in range(0, weight.shape[0], TILE_IDS):
            ids = slice(start, start + TILE_IDS)
            torch.mm(hidden, weight[ids].t(), out=out[:, ids])


@torch.no_grad()
def check_head(model: PreTrainedModel, tap: HeadTap, inputs: dict[str, Any], num_ids: int, name: str) -> None:
    """Compare the fused head with the model's own logits on ``inputs``.

    Raises ConfigError, naming the model, when they differ (it changes its logits in a way that is not known here) or
    are not finite.
    """
    was_training = model.training
    model.eval()
    with tap.removed():
        own = model(**inputs).logits.flatten(0, 1)[:, :num_ids].float()
    model(**inputs)
    head = describe_head(tap.module, model.config)
    ours = head_logits(tap.take().flatten(0, 1), head, num_ids)
    model.train(was_training)
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(head.weight.dtype, 1e-4)
    if not own.isfinite().all():
        raise ConfigError(
            f"{name} ({type(model).__name__}): its logits are NaN or Inf, so its weights are damaged or overflow"
        )
    difference = (ours - own).abs().max().item()
    limit = tolerance * max(1.0, own.abs().max().item())
    if not difference <= limit:
        known = {"logit_scale", "logits_scaling", "final_logit_softcapping"}
        settings = sorted(
            key for key in model.config.to_dict() if "logit" in key or "multiplier" in key or key in known
        )
        raise ConfigError(
            f"{name} ({type(model).__name__}): its own logits differ by {difference:.3g} from h W^T + b (allowed "
            f"{limit:.3g}), so it changes them after the head; settings that may do it: {settings or 'none found'}"
        )
