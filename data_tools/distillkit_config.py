"""The settings of arcee-ai/DistillKit's compression, which lie beside the files of a capture: compression_config.yaml.

The files do not tell how they were made: what their bytes mean follows from these settings alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from engine.errors import ConfigError

FLOAT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
SPECIAL_TERMS = ("sqrt", "exp")
MAX_IDS = 1 << 21
"""Above, DistillKit's logarithm in float32 may give an id a bit too few."""
MAX_ELEMENT_BITS = 25
"""DistillKit allows 64, but rounds in float32: with 26 bits its greatest level overflows and reads as the lowest."""


@dataclass(frozen=True)
class ResidualBin:
    """Corrections to consecutive points of the curve: whole levels of ``element_bits`` bits times one scale."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def num_bytes(self) -> int:
        """Of the scale and the levels, which end at a byte."""
        return FLOAT_BYTES[self.scale_dtype] + (self.element_bits * self.num_elements + 7) // 8


@dataclass(frozen=True)
class DistillKitConfig:
    """Named as in the file, whose defaults these are."""

    d: int
    """how many ids there are"""
    k: int
    """how many of them a position keeps"""
    exact_k: int
    """how many of those have a value of their own; the others lie on a curve"""
    residual_bins: tuple[ResidualBin, ...]
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    """powers of x and SPECIAL_TERMS"""
    term_dtype: str = "float32"
    delta_encoding: bool = True
    """each value is the difference to the one before"""
    error_diffusion: bool = False
    """how the writer rounds; what it wrote is read alike"""
    normalize_t: bool = False
    """x runs from 0 to 1 instead of 0, 1, 2, ..."""

    @classmethod
    def parse(cls, content: Any, name: str = "compression_config.yaml") -> DistillKitConfig:
        """``content`` is what was read from the file ``name``. Raises ConfigError."""
        if isinstance(content, Mapping) and "polynomial_degree" in content:
            raise ConfigError(f"{name}: polynomial_degree: of a legacy_logit_compression, which is not supported")
        values = _known(cls, content, name)
        for key in ("residual_bins", "polynomial_terms"):
            if values.get(key) is None:  # what the file holds when there are no terms
                values[key] = []
            if not isinstance(values[key], list):
                raise ConfigError(f"{name}: {key}: expected a list, found {values[key]!r}")
        bins = [_known(ResidualBin, values, f"{name}: residual_bins") for values in values["residual_bins"]]
        values["residual_bins"] = tuple(ResidualBin(**values) for values in bins)
        values["polynomial_terms"] = tuple(values["polynomial_terms"])
        config = cls(**values)
        config._check_values(name)
        config._check_together(name)
        return config

    def _check_values(self, name: str) -> None:
        _check_whole(f"{name}: d", self.d, 2, MAX_IDS)
        _check_whole(f"{name}: k", self.k, 1, self.d)
        _check_whole(f"{name}: exact_k", self.exact_k, 0, self.k)
        _check_dtype(f"{name}: exact_dtype", self.exact_dtype)
        _check_dtype(f"{name}: term_dtype", self.term_dtype)
        for residual_bin in self.residual_bins:
            _check_dtype(f"{name}: residual_bins: scale_dtype", residual_bin.scale_dtype)
            _check_whole(f"{name}: residual_bins: element_bits", residual_bin.element_bits, 1, MAX_ELEMENT_BITS)
            _check_whole(f"{name}: residual_bins: num_elements", residual_bin.num_elements, 1)
        for key in ("delta_encoding", "error_diffusion", "normalize_t"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{name}: {key}: expected true or false, found {getattr(self, key)!r}")
        for term in self.polynomial_terms:
            if term not in SPECIAL_TERMS and (type(term) is not int or term < 0):
                known = f"powers 0, 1, 2, ... and {', '.join(SPECIAL_TERMS)}"
                raise ConfigError(f"{name}: polynomial_terms: {term!r}; supported are {known}")

    def _check_together(self, name: str) -> None:
        corrected = sum(residual_bin.num_elements for residual_bin in self.residual_bins)
        if corrected > self.num_approximate:
            raise ConfigError(f"{name}: residual_bins: {corrected} elements, more than k - exact_k")
        if self.num_approximate and not self.polynomial_terms and not self.residual_bins:
            raise ConfigError(f"{name}: polynomial_terms: needed for exact_k < k without residual_bins")
        if self.residual_bins and self.polynomial_terms and FLOAT_BYTES[self.term_dtype] < 4:
            # The residuals are those of the curve as the writer's steps of 16 bits round it, which we do not repeat.
            raise ConfigError(f"{name}: term_dtype: {self.term_dtype}; with residual_bins, float32 or float64 only")

    @property
    def num_approximate(self) -> int:
        """How many values of a position lie on the curve."""
        return self.k - self.exact_k

    @property
    def id_bits(self) -> int:
        return (self.d - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        """Of a position in ``bytepacked_indices``."""
        return (self.k * self.id_bits + 7) // 8

    @property
    def value_bytes(self) -> int:
        """Of a position in ``compressed_logprobs``."""
        exact_bytes = self.exact_k * FLOAT_BYTES[self.exact_dtype]
        term_bytes = len(self.polynomial_terms) * FLOAT_BYTES[self.term_dtype]
        return exact_bytes + term_bytes + sum(residual_bin.num_bytes for residual_bin in self.residual_bins)


def bits_per_position(config: DistillKitConfig) -> int:
    """Of ids and values, each of whole bytes; without the token itself and what parquet adds or saves."""
    return 8 * (config.id_bytes + config.value_bytes)


def _known(kind: type, content: Any, place: str) -> dict[str, Any]:
    """``content`` as keyword arguments of the dataclass ``kind``."""
    keys = {field.name: field.default is MISSING for field in fields(kind)}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{place}: expected keys such as {next(iter(keys))}:, found {content!r}")
    for key in content:
        if key not in keys:
            raise ConfigError(f"{place}: {key}: unknown key; supported are {', '.join(keys)}")
    for key, is_needed in keys.items():
        if is_needed and key not in content:
            raise ConfigError(f"{place}: {key}: missing; the data can be read only with the settings of the capture")
    return dict(content)


def _check_dtype(place: str, dtype: Any) -> None:
    if dtype not in tuple(FLOAT_BYTES):  # a tuple: what YAML holds may have no hash
        raise ConfigError(f"{place}: {dtype!r}; supported are {', '.join(FLOAT_BYTES)}")


def _check_whole(place: str, value: Any, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(f"{place}: expected {bounds}, found {value!r}")
