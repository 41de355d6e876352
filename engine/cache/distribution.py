"""The teacher's distribution at some positions, in the form that codecs choose ids from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.losses.fused import BLOCK_BYTES

TILE_IDS = 128
_RARE = 1e-30
"""A label of less probability says too little of the row's normaliser."""


@dataclass(frozen=True)
class Distributions:
    """C rows of probabilities over V ids, as ``mass / total``."""

    mass: Tensor
    """[C, V], contiguous, with TILE_IDS more numbers behind the last row; a row sums to about 1"""
    tile_mass: Tensor
    """[C, tiles] float64: sum of each TILE_IDS ids, the last tile has what is left"""
    total: Tensor
    """[C] float64"""
    nll: Tensor
    """[C] float64: -log p of the label"""
    entropy: Tensor
    """[C] float64, nats"""


class Exponentiator:
    """Makes Distributions, of at most ``max_rows`` rows at a time, in memory that it keeps."""

    def __init__(self, max_rows: int, num_ids: int, device: torch.device) -> None:
        self._num_ids = num_ids
        self._memory = torch.zeros(max_rows * num_ids + TILE_IDS, device=device)
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._block = min(max_rows, threads * max(1, BLOCK_BYTES[device.type] // (4 * num_ids)))

    def __call__(self, logits: Tensor, labels: Tensor) -> Distributions:
        """The distributions of ``logits`` [C, V] fp32; good until the next call. ``labels`` [C] are ids."""
        num_rows = logits.shape[0]
        mass = self._memory[: num_rows * self._num_ids].view(num_rows, self._num_ids)
        num_tiles = -(-self._num_ids // TILE_IDS)
        tile_mass = torch.empty(num_rows, num_tiles, device=logits.device, dtype=torch.float64)
        weighted = torch.empty(num_rows, device=logits.device)
        for start in range(0, num_rows, self._block):
            rows = slice(start, start + self._block)
            p = torch.softmax(logits[rows], dim=1, out=mass[rows])
            weighted[rows] = torch.linalg.vecdot(p, logits[rows])
            tile_mass[rows] = sums_of_tiles(p)
        total = tile_mass.sum(dim=1)
        log_total = _log_normaliser(logits, mass, labels) + total.log()
        label = labels.unsqueeze(1)
        nll = log_total - logits.gather(1, label).squeeze(1).double()
        return Distributions(mass, tile_mass, total, nll, log_total - weighted / total)


def sums_of_tiles(mass: Tensor) -> Tensor:
    """[C, V] -> [C, tiles] float64."""
    full = mass.shape[1] // TILE_IDS * TILE_IDS
    sums = mass[:, :full].unflatten(1, (-1, TILE_IDS)).sum(dim=2).double()
    if full == mass.shape[1]:
        return sums
    return torch.cat([sums, mass[:, full:].sum(dim=1, keepdim=True).double()], dim=1)


def _log_normaliser(logits: Tensor, mass: Tensor, labels: Tensor) -> Tensor:
    """[C] float64: what softmax took off the logits, from the label's own: that spares a pass over all ids."""
    label = labels.unsqueeze(1)
    z, p = (each.gather(1, label).squeeze(1).double() for each in (logits, mass))
    found = z - p.clamp_min(_RARE).log()
    rare = (p < _RARE).nonzero().squeeze(1)
    found[rare] = logits[rare].double().logsumexp(dim=1)
    return found
