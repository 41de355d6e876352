"""A batch says of every position what the samples say, and nothing of padding or of damaged records."""

from __future__ import annotations

import numpy as np
import pytest

from engine.data.collate import collate
from engine.schema import IGNORE, Batch, Sample

PAD = 7


def make_sample(document_tokens: list[int], first_id: int = 10) -> Sample:
    token_ids = np.arange(first_id, first_id + sum(document_tokens), dtype=np.uint16)
    return Sample("shard.tar", f"key-{first_id}", token_ids, np.array(document_tokens, dtype=np.uint32))


def collate_plain(samples: list[Sample], sequence_tokens: int = 64) -> Batch:
    """Labels: every third token of a sample."""
    token_ids = np.concatenate([sample.token_ids for sample in samples])
    third = np.concatenate([np.arange(len(sample.token_ids)) % 3 == 0 for sample in samples])
    labels = np.where(third, token_ids.astype(np.int64), IGNORE)
    return collate(samples, (token_ids, labels), pad_id=PAD, sequence_tokens=sequence_tokens)


def unsound() -> Sample:
    nothing = np.empty(0, dtype=np.uint16)
    return Sample("shard.tar", "record 3", nothing, nothing, sound=False)


def test_every_field_against_a_loop() -> None:
    samples = [make_sample([3, 1, 5]), make_sample([12], 40), make_sample([1, 1, 1], 80)]
    batch = collate_plain(samples)
    width = 16
    assert batch.input_ids.shape == (3, width)
    for row, sample in enumerate(samples):
        place = 0
        for segment, size in enumerate(sample.document_tokens.tolist(), start=1):
            for position in range(size):
                assert batch.input_ids[row, place] == sample.token_ids[place]
                assert batch.labels[row, place] == (sample.token_ids[place] if place % 3 == 0 else IGNORE)
                assert batch.segment_ids[row, place] == segment
                assert batch.position_ids[row, place] == position
                assert (row * width + place) in batch.token_rows.tolist()
                place += 1
        assert batch.input_ids[row, place:].eq(PAD).all()
        assert batch.labels[row, place:].eq(IGNORE).all()
        assert batch.segment_ids[row, place:].eq(0).all()
        assert batch.position_ids[row, place:].eq(0).all()
    assert batch.num_tokens == sum(len(sample.token_ids) for sample in samples)
    assert batch.label_rows.tolist() == (batch.labels.flatten() != IGNORE).nonzero().flatten().tolist()
    assert batch.names == ("shard.tar/key-10", "shard.tar/key-40", "shard.tar/key-80")


@pytest.mark.parametrize(
    ("documents", "sequence_tokens", "width", "packed"),
    [
        ([[16], [16]], 64, 16, False),
        ([[16], [15]], 64, 16, True),
        ([[16], [8, 8]], 64, 16, True),
        ([[17], [3]], 64, 24, True),
        ([[17], [17]], 20, 20, True),
        ([[20], [20]], 20, 20, False),
    ],
)
def test_width_and_packed(documents: list[list[int]], sequence_tokens: int, width: int, packed: bool) -> None:
    batch = collate_plain([make_sample(sizes) for sizes in documents], sequence_tokens)
    assert batch.input_ids.shape[1] == width
    assert batch.packed is packed


def test_damaged_sample_counts_nowhere_but_is_one_segment() -> None:
    batch = collate_plain([make_sample([16]), unsound()])
    assert batch.input_ids[1].eq(PAD).all()
    assert batch.labels[1].eq(IGNORE).all()
    assert batch.segment_ids[1].eq(1).all()
    assert batch.position_ids[1].tolist() == list(range(16))
    assert batch.token_rows.tolist() == list(range(16))
    assert batch.label_rows.max() < 16
    assert not batch.packed


def test_batch_of_damaged_samples_only() -> None:
    batch = collate_plain([unsound(), unsound()])
    assert batch.input_ids.shape == (2, 8)
    assert batch.num_tokens == batch.num_labels == 0
    assert batch.segment_ids.eq(1).all()


def test_types_are_those_of_the_schema() -> None:
    batch = collate_plain([make_sample([5, 4])])
    names = ("input_ids", "labels", "segment_ids", "position_ids", "label_rows", "token_rows")
    types = {name: str(getattr(batch, name).dtype) for name in names}
    assert types.pop("segment_ids") == "torch.int32"
    assert set(types.values()) == {"torch.int64"}
