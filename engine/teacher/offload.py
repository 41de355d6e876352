"""Weights that stay in host memory: a module's come to the device when it is its turn, and are dropped after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def stream_weights(model: nn.Module, device: torch.device) -> None:
    """Keep the parameters of ``model`` on the host, in pinned memory for a GPU; its buffers move to ``device``.

    Every module brings the parameters of its own, so that about two modules' lie on the device at a time. For forward
    passes without gradients. The copies go on the stream of the forward.
    """
    for parameter in model.parameters():
        host = parameter.detach().cpu()
        parameter.data = host.pin_memory() if device.type == "cuda" else host
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        if any(parameter is not None for parameter in module._parameters.values()):
            stream = _Stream(module, device)
            module.register_forward_pre_hook(stream.bring, prepend=True)
            module.register_forward_hook(stream.drop, always_call=True)


class _Stream:
    """The parameters of one module, not those of modules inside it."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._host = {name: p for name, p in module._parameters.items() if p is not None}
        self._device = device

    def bring(self, module: nn.Module, inputs: Any) -> None:
        for name, parameter in self._host.items():
            there: Tensor = parameter.detach().to(self._device, non_blocking=True, copy=True)
            module._parameters[name] = there  # type: ignore[assignment]

    def drop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(self._host)
