"""The teacher's distribution at some positions, in the form that codecs choose ids from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_IDS = 512
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 40}
"""Rows are exponentiated in blocks, so many a thread, that stay in a core's caches; a GPU takes them whole."""


@dataclass(frozen=True)
class Distributions:
    """C rows of probabilities over V ids, as ``mass / total``.

    ``mass`` is [C, W] with V rounded up to whole tiles of ids, zeros past V; its largest value in a row is 1.
    """

    mass: Tensor
    tile_mass: Tensor
    """[C, W / TILE_IDS] float64: sum of each tile"""
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
        self._mass = torch.zeros(max_rows, -(-num_ids // TILE_IDS) * TILE_IDS, device=device)
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._block = min(max_rows, threads * max(1, _BLOCK_BYTES[device.type] // (4 * num_ids)))
        self._below_peak = torch.empty(self._block, num_ids, device=device)

    def __call__(self, logits: Tensor, labels: Tensor) -> Distributions:
        """The distributions of ``logits`` [C, V] fp32; good until the next call. ``labels`` [C] are ids."""
        num_rows = logits.shape[0]
        mass = self._mass[:num_rows]
        tiles = mass.view(num_rows, -1, TILE_IDS)
        tile_mass = torch.empty(tiles.shape[:2], device=logits.device, dtype=torch.float64)
        weighted = torch.empty(num_rows, device=logits.device)
        for start in range(0, num_rows, self._block):
            rows = slice(start, start + self._block)
            z = logits[rows]
            below = torch.sub(z, z.amax(dim=1, keepdim=True), out=self._below_peak[: z.shape[0]])
            e = torch.exp(below, out=mass[rows, : self._num_ids])
            weighted[rows] = torch.linalg.vecdot(e, below)
            tile_mass[rows] = tiles[rows].sum(dim=2)
        total = tile_mass.sum(dim=1)
        nll = total.log() - mass.gather(1, labels.unsqueeze(1)).squeeze(1).double().clamp_min(1e-45).log()
        return Distributions(mass, tile_mass, total, nll, total.log() - weighted / total)
