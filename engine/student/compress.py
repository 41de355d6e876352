"""A teacher's word embeddings in fewer dimensions, by their largest singular values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def svd_embeddings(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Fill the student's word embeddings with the teacher's, E = U S V^T cut to U S of the student's width.

    That is the best approximation of that width up to a rotation, which the layer behind it learns (XtremeDistil,
    Mukherjee and Awadallah, arXiv 2004.05686, section 3.1). Returns the share of the squared values that is kept.
    Raises ConfigError where the student's embeddings are not narrower, or are more than the teacher's.
    """
    ours, theirs = student.get_input_embeddings(), teacher.get_input_embeddings()
    assert isinstance(ours, nn.Embedding)
    assert isinstance(theirs, nn.Embedding)
    table = theirs.weight.detach().double()
    (rows, width), (their_rows, their_width) = ours.weight.shape, table.shape
    if width >= their_width or rows > their_rows:
        raise ConfigError(
            f"student.init: svd_embeddings makes [{rows:,}, {width}] of the teacher's [{their_rows:,}, {their_width}]; "
            "the student's must be narrower, and no more rows"
        )
    directions, kept = _main_directions(table, width)
    ours.weight.copy_(table[:rows] @ directions)
    student.tie_weights()
    return kept


def _main_directions(table: Tensor, width: int) -> tuple[Tensor, float]:
    """[G, width] right singular vectors of the largest values, each with a sign of its own making, and their share.

    From the eigenvectors of E^T E, [G, G]: the table itself may have a quarter of a million rows.
    """
    values, vectors = torch.linalg.eigh(table.t() @ table)
    chosen = vectors[:, -width:].flip(1)
    largest = chosen.abs().argmax(dim=0)
    signs = chosen.gather(0, largest[None]).sign()
    return chosen * signs, float(values[-width:].sum() / values.sum())
