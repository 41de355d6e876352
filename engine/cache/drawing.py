"""Drawing ids from the teacher's distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.cache.distribution import TILE_IDS, Distributions
from engine.cache.kept import Kept

_BELOW_ONE = 1.0 - 1e-9


def draw_systematically(teacher: Distributions, offsets: Tensor, num_draws: int) -> Tensor:
    """[C, num_draws] ids, rising: equal strides along the cumulative distribution of each row.

    The cumulative distribution is formed over tiles of ids first, and inside a tile only where a draw falls.
    ``offsets`` [C] float64 are uniform in [0, 1).
    """
    ends = teacher.tile_mass.cumsum(dim=1)
    num_tiles, num_ids = ends.shape[1], teacher.mass.shape[1]
    strides = torch.arange(num_draws, device=ends.device, dtype=torch.float64)
    points = (offsets.unsqueeze(1) + strides).mul_(1.0 / num_draws).clamp_(max=_BELOW_ONE) * ends[:, -1:]
    tile = torch.searchsorted(ends, points, right=True)
    in_all = (tile + torch.arange(len(ends), device=ends.device).unsqueeze(1) * num_tiles).flatten()
    met, which = torch.unique_consecutive(in_all, return_inverse=True)
    inside = _tiles(teacher.mass, met // num_tiles, met % num_tiles).double().cumsum_(dim=1)
    mass = inside[:, -1:].clone()
    begin = ends.flatten()[met] - teacher.tile_mass.flatten()[met]
    share = ((points.flatten() - begin[which]) / mass.squeeze(1)[which]).clamp_(0.0, _BELOW_ONE)
    # one rising line through all tiles that were met: number m covers (2m, 2m + 1]
    line = inside.div_(mass).add_(torch.arange(0, 2 * len(met), 2, device=ends.device).unsqueeze(1))
    in_line = torch.searchsorted(line.flatten(), share + 2 * which, right=True)
    drawn = tile * TILE_IDS + (in_line - which * TILE_IDS).view_as(tile)
    return drawn.clamp_(max=num_ids - 1)


def _tiles(mass: Tensor, rows: Tensor, tiles: Tensor) -> Tensor:
    """[K, TILE_IDS] the given tiles of the given rows; zeros past a row's end. ``mass`` is that of Distributions."""
    num_ids = mass.shape[1]
    windows = mass.as_strided((mass.numel(), TILE_IDS), (1, 1))
    found = windows[rows * num_ids + tiles * TILE_IDS]
    left = num_ids % TILE_IDS
    if left:
        found[tiles == num_ids // TILE_IDS, left:] = 0.0
    return found


def counted(drawn: Tensor, top_ids: Tensor) -> Kept:
    """[P, num_draws] drawn ids, rising in each row -> each id once, with its share of the draws."""
    is_first = torch.ones_like(drawn, dtype=torch.bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    first = is_first.flatten().nonzero().squeeze(1)
    counts = torch.diff(first, append=first.new_tensor([drawn.numel()]))
    positions, ids = first // drawn.shape[1], drawn.flatten()[first]
    shares = counts.float() / drawn.shape[1]
    return Kept(*(part.cpu().numpy() for part in (positions, ids, shares, top_ids)))
