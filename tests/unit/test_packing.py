"""Packing: nothing is lost, every piece is framed, and it goes on from anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools import build_shards
from data_tools.packing import MIN_PIECE_TOKENS, Framing, Packer, Position
from engine.data.shards import ShardSet
from tests.sharding import arguments, pieces_of, some_documents, write_text

ROOT = Path(__file__).parents[2]


def test_causal_documents_end_with_eos_and_nothing_is_lost(decoder_tokenizer: Path, tmp_path: Path) -> None:
    documents = some_documents(50)
    build_shards.main(arguments(write_text(tmp_path / "a.txt", documents), decoder_tokenizer, tmp_path / "out"))
    stream = [token for piece in pieces_of(tmp_path / "out") for token in piece]
    expected = [token for text in documents for token in [*(2 + int(w[4:]) for w in text.split()), 1]]
    assert stream == expected
    shards = ShardSet.open(str(tmp_path / "out" / "manifest.json"))
    assert shards.manifest.num_documents == 50
    assert shards.token_counts().tolist() == np.bincount(expected, minlength=42).tolist()
    lengths = [len(shards.read(0, i).token_ids) for i in range(shards.manifest.num_samples)]
    assert all(32 - MIN_PIECE_TOKENS < length <= 32 for length in lengths[:-1])


def test_masked_pieces_are_framed_each(encoder_tokenizer: Path, tmp_path: Path) -> None:
    documents = some_documents(50)
    source = write_text(tmp_path / "a.txt", documents)
    build_shards.main(arguments(source, encoder_tokenizer, tmp_path / "out", task="masked_lm"))
    pieces = pieces_of(tmp_path / "out")
    assert all(piece[0] == 2 and piece[-1] == 3 and len(piece) > 2 for piece in pieces)
    stream = [token for piece in pieces for token in piece[1:-1]]
    assert stream == [5 + int(word[4:]) for text in documents for word in text.split()]


def test_a_gap_too_small_for_a_piece_stays_open() -> None:
    packer = Packer(Framing((), (9,), each_piece=False), 32, Position(0, 0, 0))
    assert list(packer.add(0, np.full(27, 5, np.uint32))) == []
    packed = list(packer.add(1, np.full(40, 6, np.uint32)))
    assert [len(sequence.token_ids) for sequence in packed] == [28, 32]
    assert packed[0].position == Position(1, 0, 1)
    assert packed[1].position == Position(1, 32, 1)
    assert [sequence.token_ids.tolist() for sequence in packer.last()] == [[6] * 8 + [9]]


@pytest.mark.parametrize("each_piece", [True, False])
def test_packing_goes_on_from_any_position(each_piece: bool) -> None:
    framing = Framing((7,), (9,), each_piece)
    rng = np.random.default_rng(3)
    documents = [rng.integers(10, 99, size=rng.integers(1, 90)).astype(np.uint32) for _ in range(40)]

    def pack(start: Position) -> list[tuple[list[int], list[int], Position]]:
        packer = Packer(framing, 32, start)
        sequences = [s for i, ids in enumerate(documents) if i >= start.document for s in packer.add(i, ids)]
        return [(s.token_ids.tolist(), s.document_tokens.tolist(), s.position) for s in [*sequences, *packer.last()]]

    whole = pack(Position(0, 0, 0))
    assert whole[-1][2] == Position(40, 0, 40)
    for done in range(1, len(whole)):
        assert pack(whole[done - 1][2]) == whole[done:]
