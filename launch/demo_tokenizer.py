"""The demo's tokenizer: byte-level BPE, saved as a folder that transformers loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = {
    "causal_lm": {"eos_token": "<|endoftext|>"},
    "masked_lm": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
}


def train_tokenizer(texts: Iterable[str], task: str, num_ids: int, folder: Path) -> None:
    """Write ``folder`` with ``num_ids`` ids, the special ones first. The folder is there whole or not at all."""
    special = SPECIAL_TOKENS[task]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ids,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if task == "masked_lm":
        ends = [(special[name], tokenizer.token_to_id(special[name])) for name in ("cls_token", "sep_token")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    temporary = folder.with_name(f".{folder.name}.partial")
    temporary.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(temporary / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
    (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(temporary, folder)
