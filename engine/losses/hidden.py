"""Comparison of hidden states on chosen layers, summed over the selected positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over rows of 1 - cosine; [N, G] both. DistilBERT's third term (arXiv 1910.01108)."""
    return (1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=1)).sum()


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over rows of the mean squared difference over the width; [N, G] both."""
    return (student.float() - teacher.float()).square().mean(dim=1).sum()


HIDDEN_LOSSES = {"hidden_cosine": hidden_cosine, "hidden_mse": hidden_mse}


def layer_pairs(
    layers: str | tuple[tuple[int, int], ...], num_student: int, num_teacher: int
) -> tuple[tuple[int, int], ...]:
    """Pairs (student, teacher) of indices into the hidden states, where 0 is the embeddings.

    ``last`` is the final states; ``spread`` is each student layer with the teacher layer at the same relative depth.
    Raises IndexError, as a (name, index, highest) triple, for a pair out of range.
    """
    if layers == "last":
        return ((num_student, num_teacher),)
    if layers == "spread":
        return tuple((i, round(i * num_teacher / num_student)) for i in range(1, num_student + 1))
    assert not isinstance(layers, str)
    for pair in layers:
        for name, index, highest in (("student", pair[0], num_student), ("teacher", pair[1], num_teacher)):
            if not 0 <= index <= highest:
                raise IndexError(name, index, highest)
    return layers


def select_rows(states: Tensor, rows: Tensor) -> Tensor:
    """[B, T, H] and flat indices [N] -> [N, H]."""
    return torch.index_select(states.flatten(0, 1), 0, rows)
