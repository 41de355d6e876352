"""Pseudo-perplexity of a masked language model: each token masked alone, and predicted from all others.

Salazar et al., "Masked Language Model Scoring", arXiv 1910.14659: exp of the mean of -log p(token | the others).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.data.collate import collate
from engine.data.shards import ShardSet
from engine.evaluation import EvenlySpaced
from engine.losses.head import head_logits
from engine.losses.hidden import select_rows
from engine.losses.reading import ModelReader
from engine.schema import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from engine.tasks.task import Task

ROWS_AT_ONCE = 64


@torch.inference_mode()
def pseudo_perplexity(
    model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase, shards: ShardSet, max_sequences: int
) -> tuple[float, int]:
    """Over at most ``max_sequences`` sequences of the shards; and the number of tokens scored.

    Costs a forward pass a token.
    """
    counts = shards.manifest.samples_per_shard
    places = EvenlySpaced(counts, min(max_sequences, sum(counts)))
    reader = ModelReader(model, task, hidden_states=False)
    assert reader.head is not None
    special = np.array(tokenizer.all_special_ids)
    total, num_tokens = 0.0, 0
    try:
        for sequence in range(places.sequences_per_epoch):
            location = places.locate(sequence)
            assert location is not None
            sample = shards.read(location.shard, location.index)
            ids = sample.token_ids.astype(np.int64)
            labelled = (ids, np.full(len(ids), IGNORE))
            batch = collate([sample], labelled, pad_id=shards.manifest.pad_id, sequence_tokens=len(ids))
            wanted = torch.from_numpy(np.flatnonzero(~np.isin(ids, special)))
            for rows in wanted.split(ROWS_AT_ONCE):
                one_masked = _masked(batch, rows, tokenizer.mask_token_id).to(model.device)
                answer = reader.read(one_masked)
                assert answer.head_input is not None
                states = select_rows(answer.head_input, one_masked.label_rows)
                logits = head_logits(states, reader.head, shards.manifest.vocab_size)
                truth = one_masked.labels.flatten()[one_masked.label_rows]
                total += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
            num_tokens += len(wanted)
    finally:
        reader.release()
    return math.exp(total / max(1, num_tokens)), num_tokens


def _masked(batch: Batch, places: torch.Tensor, mask_id: int) -> Batch:
    """The one sequence of ``batch`` once for each place, with that place masked."""
    count, width = len(places), batch.input_ids.shape[1]
    rows = torch.arange(count)
    ids = batch.input_ids.expand(count, width).clone()
    labels = torch.full_like(ids, IGNORE)
    labels[rows, places] = ids[rows, places]
    ids[rows, places] = mask_id
    return replace(
        batch,
        input_ids=ids,
        labels=labels,
        segment_ids=batch.segment_ids.expand(count, width),
        position_ids=batch.position_ids.expand(count, width),
        label_rows=rows * width + places,
        names=batch.names * count,
        examples=batch.examples * count,
    )
