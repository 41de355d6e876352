"""Compress log-probabilities by the scheme of arcee-ai/DistillKit, to measure what it loses at its size.

It keeps the k most probable ids, stores the first values as floats and fits a curve to the others by least squares: in
log-probability, each rank with the same weight, by a pseudo-inverse. DistillKit does that in float32, where powers up
to 111^4 leave no digits: by torch on a CPU (MKL) its recommended curve is off by nats. So float64 is the default here,
which gives what the bytes can hold; ``fit_dtype=torch.float32`` gives what the published code does on this machine.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_tools.distillkit_config import DistillKitConfig, ResidualBin
from data_tools.distillkit_format import basis
from engine.errors import ConfigError

_SMALLEST_SINGULAR_VALUE = 1e-5
"""Directions in which the basis is smaller are left out of the fit."""


def recommended(vocab_size: int) -> DistillKitConfig:
    """That of the README "for new captures": 344 bytes a position for a vocabulary of 2^17 + 1 to 2^18 ids."""
    return _without_bins(vocab_size, 128, 16, (0, 1, 2, 3, 4, "sqrt"))


def budget(vocab_size: int) -> DistillKitConfig:
    """The README's "budget pick": 127 bytes a position for as many ids."""
    return _without_bins(vocab_size, 50, 1, (0, 1, "sqrt"))


def _without_bins(vocab_size: int, k: int, exact_k: int, terms: tuple[int | str, ...]) -> DistillKitConfig:
    return DistillKitConfig(vocab_size, k, exact_k, (), "bfloat16", terms, "float32", delta_encoding=False)


def encode(
    config: DistillKitConfig, log_p: Tensor, fit_dtype: torch.dtype = torch.float64
) -> tuple[np.ndarray, np.ndarray]:
    """What ``decode`` reads: ids [P, id_bytes] and values [P, value_bytes], both uint8.

    Args:
        log_p: [P, V] log-probabilities, V at most config.d, on any device.
        fit_dtype: of the least squares' arithmetic.

    Raises ConfigError for error_diffusion, which works element by element and which its authors advise against.
    """
    if config.error_diffusion:
        raise ConfigError("error_diffusion: not supported; false is")
    top = log_p.float().topk(config.k, dim=1)
    values = top.values.cpu()
    if config.delta_encoding:
        values = torch.cat([values[:, :1], values.diff(dim=1)], dim=1)
    exact, rest = values.tensor_split([config.exact_k], dim=1)
    parts = [_as_bytes(exact, config.exact_dtype)]
    terms = torch.from_numpy(basis(config))
    coefficients = _fit(terms.to(fit_dtype), rest.to(fit_dtype)).to(getattr(torch, config.term_dtype))
    parts.append(_as_bytes(coefficients, config.term_dtype))
    rest = rest - (coefficients.double() @ terms.T).float()
    for residual_bin in config.residual_bins:
        residual, rest = rest.tensor_split([residual_bin.num_elements], dim=1)
        parts += _quantise(residual, residual_bin)
    return pack(top.indices.cpu().numpy(), config.id_bits), np.concatenate(parts, axis=1)


def pack(values: np.ndarray, width: int) -> np.ndarray:
    """[P, N] whole numbers below 2^width -> [P, bytes] uint8: end to end, the highest bit of each first."""
    bits = (values[:, :, None] >> np.arange(width - 1, -1, -1) & 1).astype(np.uint8)
    return np.packbits(bits.reshape(len(values), -1), axis=1)


def _fit(terms: Tensor, values: Tensor) -> Tensor:
    """[P, T], of the basis [N, T] to ``values`` [P, N]."""
    left, singular, right = torch.linalg.svd(terms, full_matrices=False)
    inverse = torch.where(singular > _SMALLEST_SINGULAR_VALUE, 1.0 / singular, 0.0)
    return (values @ left * inverse) @ right


def _quantise(residual: Tensor, residual_bin: ResidualBin) -> list[np.ndarray]:
    """The scale's bytes and the levels': the greatest residual is the greatest level, or one above it."""
    bits = residual_bin.element_bits
    lowest, highest, steps = (0, 1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2 ** (bits - 1))
    greatest = residual.abs().amax(dim=1, keepdim=True)
    scale = torch.where(greatest == 0, 1.0, greatest / steps).to(getattr(torch, residual_bin.scale_dtype))
    levels = (residual / scale.float()).round().clamp(lowest, highest) - lowest
    return [_as_bytes(scale, residual_bin.scale_dtype), pack(levels.long().numpy(), bits)]


def _as_bytes(values: Tensor, dtype: str) -> np.ndarray:
    """[P, N] -> [P, N * bytes of dtype] uint8."""
    return values.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy()
