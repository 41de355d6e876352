"""What DistillKit's description says of its bytes is what is read; what does not fit the settings is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks.distillkit_scheme import budget, encode, pack, recommended
from data_tools.distillkit_config import DistillKitConfig, ResidualBin, bits_per_position
from data_tools.distillkit_format import basis, decode, unpack
from engine.errors import ConfigError, DataError

VOCAB = 151936
WRITTEN = """
d: 151670
delta_encoding: false
error_diffusion: false
exact_dtype: bfloat16
exact_k: 16
k: 128
normalize_t: false
polynomial_terms: [0, 1, 2, 3, 4, sqrt]
residual_bins:
- {element_bits: 8, num_elements: 16, scale_dtype: float16}
term_dtype: float32
"""
SMALL = DistillKitConfig(8, 7, 2, (), "bfloat16", (0, 1, "sqrt"), delta_encoding=False)
SMALL_IDS = bytes([0b11100010, 0b00110101, 0b10110000])  # 7 0 4 3 2 6 6, three bits each, then three of padding
SMALL_VALUES = bytes.fromhex(
    "00bf 00c0"  # bfloat16, lower byte first: -0.5 is bf00, -2 is c000
    "000040c0 000000bf 000080bf"  # float32: -3 is c0400000, -0.5 is bf000000, -1 is bf800000
)


def rows(content: bytes, positions: int = 1) -> np.ndarray:
    return np.frombuffer(content * positions, np.uint8).reshape(positions, -1)


def log_probabilities(positions: int = 20, ids: int = 3000) -> torch.Tensor:
    z = torch.randn(positions, ids, generator=torch.Generator().manual_seed(1)) * 3
    return torch.log_softmax(z, dim=1)


def read(text: str = WRITTEN, **changes: Any) -> DistillKitConfig:
    return DistillKitConfig.parse(yaml.safe_load(text) | changes)


def test_ids_are_packed_highest_bit_first() -> None:
    """3 and 131073 in 18 bits: 000000000000000011 100000000000000001, then four bits of padding."""
    packed = rows(bytes([0b00000000, 0b00000000, 0b11100000, 0b00000000, 0b00010000]))
    assert unpack(packed, 18, 2).tolist() == [[3, 131073]]
    assert pack(np.array([[3, 131073]]), 18).tolist() == packed.tolist()
    assert unpack(rows(b"\xa5"), 4, 2).tolist() == [[0b1010, 0b0101]]
    assert unpack(rows(b"\xac"), 3, 2).tolist() == [[5, 3]]


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 8, 9, 11, 13, 15, 16, 17, 18, 19, 21, 25])
def test_what_is_packed_is_read_at_every_place_in_a_byte(width: int) -> None:
    """Numbers that change every bit at a border, in as many places as there are; the words are those of plain text."""
    top = (1 << width) - 1
    edges = [0, top, 1, top ^ 1, 1 << width - 1, top >> 1, 0x155555555 & top, 0xAAAAAAAA & top]
    values = np.array([np.roll(edges * 5, shift) for shift in range(8)])
    text = ["".join(f"{value:0{width}b}" for value in row) for row in values.tolist()]
    by_hand = [bytes(int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8)) for bits in text]
    packed = pack(values, width)
    assert [row.tobytes() for row in packed] == by_hand
    assert (unpack(packed, width, values.shape[1]) == values).all()


def test_values_are_floats_and_then_a_curve() -> None:
    """The curve is -3 - x/2 - sqrt(x) at x = 0, 1, 2, 3, 4."""
    ids, log_p = decode(SMALL, rows(SMALL_IDS), rows(SMALL_VALUES))
    assert ids.dtype == np.int64
    assert log_p.dtype == np.float32
    assert ids.tolist() == [[7, 0, 4, 3, 2, 6, 6]]
    np.testing.assert_allclose(log_p, [[-0.5, -2, -3, -4.5, -4 - 2**0.5, -4.5 - 3**0.5, -7]], rtol=1e-6)


def test_the_curve_may_run_from_0_to_1() -> None:
    log_p = decode(replace(SMALL, normalize_t=True), rows(SMALL_IDS), rows(SMALL_VALUES))[1]
    np.testing.assert_allclose(log_p[0, [2, 3, 6]], [-3, -3 - 0.125 - 0.5, -4.5], rtol=1e-6)


def test_deltas_are_summed_over_floats_and_curve() -> None:
    log_p = decode(replace(SMALL, delta_encoding=True), rows(SMALL_IDS), rows(SMALL_VALUES))[1]
    np.testing.assert_allclose(log_p[0, :4], [-0.5, -2.5, -5.5, -10], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "content"),
    [
        ("float16", "00b8 00c0"),
        ("bfloat16", "00bf 00c0"),
        ("float32", "000000bf 000000c0"),
        ("float64", "000000000000e0bf 00000000000000c0"),
    ],
)
def test_each_type_of_float_is_read(dtype: str, content: str) -> None:
    config = DistillKitConfig(4, 2, 2, (), dtype, delta_encoding=False)
    ids, log_p = decode(config, rows(b"\x60"), rows(bytes.fromhex(content)))
    assert ids.tolist() == [[1, 2]]
    assert log_p.tolist() == [[-0.5, -2.0]]


def test_bins_correct_the_first_points_of_the_curve() -> None:
    """Levels of 4 bits are shifted by 8, one bit is a sign; the scales are 0.25 in float16 and 0.5 in float32."""
    bins = (ResidualBin("float16", 4, 3), ResidualBin("float32", 1, 3))
    config = DistillKitConfig(8, 7, 0, bins, polynomial_terms=(0,), delta_encoding=False)
    constant = "000080c0"  # -4
    levels = "0034 08f0 0000003f a0"  # 0 8 15 and 1 0 1
    log_p = decode(config, rows(SMALL_IDS), rows(bytes.fromhex(constant + levels)))[1]
    assert log_p.tolist() == [[-6.0, -4.0, -2.25, -3.5, -4.5, -3.5, -4.0]]
    without_curve = replace(config, k=6, polynomial_terms=())
    log_p = decode(without_curve, rows(bytes(3)), rows(bytes.fromhex(levels)))[1]
    assert log_p.tolist() == [[-2.0, 0.0, 1.75, 0.5, -0.5, 0.5]]


def test_sizes_are_those_of_the_two_settings_of_the_readme() -> None:
    """128 ids of 18 bits, 16 floats of 2 bytes, 6 of 4; and 50 ids, of which 900 bits fill 113 bytes, 2 and 3 of 4."""
    assert bits_per_position(recommended(VOCAB)) == 8 * (288 + 32 + 24) == 8 * 344
    assert bits_per_position(budget(VOCAB)) == 8 * (113 + 2 + 12) == 8 * 127
    assert bits_per_position(recommended(1 << 17)) == 8 * 328
    assert bits_per_position(budget(1 << 16)) == 8 * 114  # what the README says, without telling for which vocabulary
    assert recommended((1 << 17) + 1).id_bits == 18


def test_a_bin_ends_at_a_byte() -> None:
    assert ResidualBin("float16", 3, 3).num_bytes == 2 + 2
    assert bits_per_position(read()) == 8 * (288 + 32 + 24 + 2 + 16)


@pytest.mark.parametrize("config", [recommended(VOCAB), budget(VOCAB)], ids=["recommended", "budget"])
def test_what_the_scheme_writes_is_read(config: DistillKitConfig) -> None:
    """Ids exactly, the first values to bfloat16, the others to the closest curve."""
    log_p = log_probabilities()
    packed_ids, packed_values = encode(config, log_p)
    assert 8 * (packed_ids.shape[1] + packed_values.shape[1]) == bits_per_position(config)
    ids, got = decode(config, packed_ids, packed_values)
    top = log_p.topk(config.k, dim=1)
    assert (ids == top.indices.numpy()).all()
    assert (got[:, : config.exact_k] == top.values[:, : config.exact_k].bfloat16().float().numpy()).all()
    rest, terms = top.values[:, config.exact_k :].double().numpy().T, basis(config)
    closest = terms @ np.linalg.lstsq(terms, rest, rcond=None)[0]
    np.testing.assert_allclose(got[:, config.exact_k :].T, closest, atol=1e-4)


@pytest.mark.parametrize("delta_encoding", [False, True])
@pytest.mark.parametrize("terms", [(), (0, 1, "sqrt")])
def test_bins_of_many_bits_leave_no_error(delta_encoding: bool, terms: tuple[int | str, ...]) -> None:
    bins = (ResidualBin("float32", 17, 10), ResidualBin("float64", 24, 22))
    config = DistillKitConfig(3000, 40, 8, bins, "float32", terms, "float32", delta_encoding)
    log_p = log_probabilities()
    got = decode(config, *encode(config, log_p))[1]
    np.testing.assert_allclose(got, log_p.topk(40, dim=1).values.numpy(), atol=2e-4)


def test_a_single_bit_is_the_sign_of_a_residual() -> None:
    config = DistillKitConfig(3000, 3, 2, (ResidualBin("float32", 1, 1),), "float32", (), delta_encoding=True)
    log_p = log_probabilities()
    got = decode(config, *encode(config, log_p))[1]
    np.testing.assert_allclose(got, log_p.topk(3, dim=1).values.numpy(), atol=1e-5)


def test_lists_and_empty_rows_are_read() -> None:
    ids, log_p = decode(SMALL, [list(SMALL_IDS)] * 2, [list(SMALL_VALUES)] * 2)
    assert ids.shape == log_p.shape == (2, 7)
    ids, log_p = decode(SMALL, [], [])
    assert ids.shape == log_p.shape == (0, 7)


def test_truncated_rows_are_refused() -> None:
    ids, values = rows(SMALL_IDS, 3), rows(SMALL_VALUES, 3)
    with pytest.raises(DataError, match=r"bytepacked_indices: position 0 has 2 bytes, the settings ask for 3"):
        decode(SMALL, ids[:, :2], values)
    with pytest.raises(DataError, match=r"compressed_logprobs: position 1 has 15 bytes, the settings ask for 16"):
        decode(SMALL, ids, [values[0], values[1, :15], values[2]])
    with pytest.raises(DataError, match=r"bytepacked_indices has 3 positions, compressed_logprobs 2"):
        decode(SMALL, ids, values[:2])
    with pytest.raises(DataError, match=r"position 0 has 3 bytes, the settings ask for 16"):
        decode(replace(SMALL, d=VOCAB), ids, values)


def test_what_cannot_be_is_refused() -> None:
    config = DistillKitConfig(5, 2, 2, (), "float16", delta_encoding=False)
    fine = bytes.fromhex("00b800c0")
    with pytest.raises(DataError, match=r"position 0, rank 1: 7 is no id of d = 5"):
        decode(config, rows(bytes([0b00111100])), rows(fine))
    with pytest.raises(DataError, match=r"position 1, rank 0: -inf is no log-probability"):
        decode(config, rows(b"\x00\x00").reshape(2, 1), rows(fine + bytes.fromhex("00fc00c0")).reshape(2, 4))


def test_the_written_settings_are_read() -> None:
    config = read()
    assert config.polynomial_terms == (0, 1, 2, 3, 4, "sqrt")
    assert config.residual_bins == (ResidualBin("float16", 8, 16),)
    assert replace(config, d=VOCAB, residual_bins=()) == recommended(VOCAB)
    least = DistillKitConfig.parse({"d": 5, "k": 2, "exact_k": 2, "residual_bins": [], "polynomial_terms": None})
    assert least.delta_encoding
    assert (least.exact_dtype, least.term_dtype) == ("float32", "float32")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"top_p": 0.9}, "top_p: unknown key; supported are d, k, exact_k"),
        ({"polynomial_degree": 8}, "polynomial_degree: of a legacy_logit_compression, which is not supported"),
        ({"d": 1}, "d: expected 2 to 2097152, found 1"),
        ({"k": "128"}, "k: expected 1 to 151670, found '128'"),
        ({"exact_k": 129}, "exact_k: expected 0 to 128, found 129"),
        ({"exact_dtype": "float8"}, "exact_dtype: 'float8'; supported are float16, bfloat16, float32, float64"),
        ({"term_dtype": ["float32"]}, "term_dtype: ['float32']; supported are"),
        ({"term_dtype": "bfloat16"}, "term_dtype: bfloat16; with residual_bins, float32 or float64 only"),
        ({"polynomial_terms": [0, "log"]}, "polynomial_terms: 'log'; supported are powers 0, 1, 2, ... and sqrt, exp"),
        ({"polynomial_terms": [-1]}, "polynomial_terms: -1; supported are"),
        ({"polynomial_terms": "sqrt"}, "polynomial_terms: expected a list, found 'sqrt'"),
        ({"polynomial_terms": [], "residual_bins": []}, "polynomial_terms: needed for exact_k < k"),
        ({"exact_k": 120}, "residual_bins: 16 elements, more than k - exact_k"),
        ({"residual_bins": [8]}, "residual_bins: expected keys such as scale_dtype:, found 8"),
        ({"residual_bins": [{"scale_dtype": "float16"}]}, "residual_bins: element_bits: missing"),
        (
            {"residual_bins": [{"scale_dtype": "float16", "element_bits": 26, "num_elements": 1}]},
            "residual_bins: element_bits: expected 1 to 25, found 26",
        ),
        ({"delta_encoding": 0}, "delta_encoding: expected true or false, found 0"),
    ],
)
def test_settings_that_cannot_be_read_are_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(**changes)
    assert str(refusal.value).startswith(f"compression_config.yaml: {problem}")


def test_settings_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"info\.json: d: missing"):
        DistillKitConfig.parse({"k": 128}, "info.json")
    with pytest.raises(ConfigError, match="expected keys such as d:, found None"):
        DistillKitConfig.parse(None)
    with pytest.raises(ConfigError, match="error_diffusion"):
        encode(replace(budget(3000), error_diffusion=True), log_probabilities())
