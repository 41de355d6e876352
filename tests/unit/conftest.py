"""Tokenizers that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sharding import save_tokenizer


@pytest.fixture(scope="session")
def encoder_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("encoder"), masked=True)


@pytest.fixture(scope="session")
def decoder_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("decoder"), masked=False)
