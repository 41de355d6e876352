"""Whole states come back exactly, or within the error of their type."""

from __future__ import annotations

import pytest
import torch

from engine.cache.states import RELATIVE_ERROR, StatesCodec
from engine.errors import CacheError


@pytest.mark.parametrize("dtype", RELATIVE_ERROR)
@pytest.mark.parametrize("num_layers", [0, 2])
def test_states_come_back_to_the_stated_error(dtype: str, num_layers: int) -> None:
    codec = StatesCodec(dtype, 24, num_layers)
    chance = torch.Generator().manual_seed(0)
    sizes = [(5, 9), (0, 3), (7, 7)]
    whole = []
    for num_positions, num_tokens in sizes:
        layers_of_sample = [torch.randn(num_tokens, 24, generator=chance) for _ in range(num_layers)]
        whole.append((torch.randn(num_positions, 24, generator=chance) * 3, layers_of_sample))
    hidden, layers = codec.decode([codec.encode(states, parts) for states, parts in whole])
    expected = [torch.cat([states for states, _ in whole])]
    expected += [torch.cat([parts[layer] for _, parts in whole]) for layer in range(num_layers)]
    for got, wanted in zip([hidden, *layers], expected, strict=True):
        assert got.shape == wanted.shape
        floor = wanted.abs().amax(dim=1, keepdim=True) * (2.0**-14 if dtype == "fp8" else 2.0**-20)
        assert ((got.float() - wanted).abs() <= wanted.abs() * RELATIVE_ERROR[dtype] + floor).all()


def test_a_record_of_another_length_is_refused() -> None:
    codec = StatesCodec("bf16", 8, 0)
    record = codec.encode(torch.randn(4, 8), [])
    for spoilt in (record[:-1], record + b"\0", b""):
        with pytest.raises(ValueError, match=r"expected|ends"):
            codec.decode([spoilt])


@pytest.mark.parametrize("dtype", RELATIVE_ERROR)
def test_no_records_are_nothing(dtype: str) -> None:
    hidden, layers = StatesCodec(dtype, 8, 2).decode([])
    assert [len(hidden), *map(len, layers)] == [0, 0, 0]


def test_a_state_that_is_too_large_for_its_type_is_refused() -> None:
    states = torch.tensor([[1.0, 70_000.0]])
    with pytest.raises(CacheError, match=r"7e\+04 is past what fp16 can hold; set cache.codec.dtype: bf16"):
        StatesCodec("fp16", 2, 0).encode(states, [])
    assert StatesCodec("bf16", 2, 0).decode([StatesCodec("bf16", 2, 0).encode(states, [])])[0].isfinite().all()
