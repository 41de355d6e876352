"""Masked language modelling: some tokens are hidden or changed, and predicted from both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config.run import TaskSection
from engine.data.collate import Labelled
from engine.data.masking import MaskSettings, mask_key, mask_tokens, token_weights
from engine.errors import ConfigError
from engine.schema import Batch, Sample
from engine.tasks.packing import encoder_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MaskedLM:
    """Masks as ``config`` says; special tokens are never masked. Raises ConfigError for a tokenizer without a mask."""

    kind = "masked_lm"
    over_vocabulary = True

    def __init__(self, config: TaskSection, tokenizer: PreTrainedTokenizerBase, token_counts: np.ndarray) -> None:
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                f"task.kind is masked_lm, but the tokenizer {tokenizer.name_or_path!r} has no mask token; "
                "use the tokenizer of an encoder, or task.kind: causal_lm"
            )
        self._seed, self._rounds = config.mask_seed, config.mask_rounds
        self._maskable = np.zeros(len(token_counts), dtype=bool)
        self._maskable[list(tokenizer.get_vocab().values())] = True
        self._maskable[tokenizer.all_special_ids] = False
        self._weights = token_weights(token_counts, config.mask_smoothing)
        self._settings = MaskSettings(
            mask_fraction=config.mask_fraction,
            mask_replace=config.mask_replace,
            mask_random=config.mask_random,
            mask_id=tokenizer.mask_token_id,
            ordinary_ids=np.flatnonzero(self._maskable),
        )

    def label(self, samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        """Rounds repeat after ``mask_rounds``."""
        token_ids = np.concatenate([sample.token_ids for sample in samples])
        return mask_tokens(
            token_ids,
            self._maskable[token_ids],
            [len(sample.token_ids) for sample in samples],
            keys=[mask_key(self._seed, s.key, number % self._rounds) for s, number in zip(samples, rounds)],
            settings=self._settings,
            weights=self._weights,
        )

    def model_inputs(self, batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
        return encoder_inputs(batch, model)

    def logits(self, output: Any, batch: Batch) -> Tensor:
        raise AssertionError("the fused head forms them")

    def observe(self, logits: Tensor, batch: Batch) -> list[Any]:
        return []

    def score(self, observations: Sequence[Any]) -> None:
        return None
