"""Tasks: labels, the fit of shards and tokenizer, and packed documents that equal documents alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from engine.config.run import TaskSection
from engine.data.collate import Labelled, collate
from engine.data.manifest import Manifest
from engine.errors import ConfigError, DataError
from engine.models import MODEL_CLASSES
from engine.schema import IGNORE, Batch, Sample
from engine.tasks.causal_lm import CausalLM
from engine.tasks.masked_lm import MaskedLM
from engine.tasks.packing import encoder_inputs
from engine.tasks.packing_trial import check_packing, check_positions
from engine.tasks.task import Task, build_task
from engine.tasks.tokenizer import fingerprint

NUM_IDS, WINDOW, SEQUENCE_TOKENS = 99, 8, 64
SIZES: dict[str, Any] = {
    "vocab_size": NUM_IDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": SEQUENCE_TOKENS + 2,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {**SIZES, **SPECIAL, "num_key_value_heads": 2}
LOCAL: dict[str, Any] = {"head_dim": 8, "sliding_window": WINDOW}
DISTILBERT = {"vocab_size": NUM_IDS, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
GPT2 = {"vocab_size": NUM_IDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MODERNBERT = {**SIZES, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 2 * WINDOW}
ENCODERS = {
    "bert": SIZES,
    "roberta": {**SIZES, "pad_token_id": 1},
    "modernbert": {**MODERNBERT, "global_attn_every_n_layers": 3},
    "distilbert": DISTILBERT,
    "electra": {**SIZES, "embedding_size": 32},
}
DECODERS = {
    "gpt2": {**GPT2, "bos_token_id": 1, "eos_token_id": 2},
    "llama": DECODER,
    "qwen3": {**DECODER, "head_dim": 8},
    "gemma2": {**DECODER, **LOCAL},
    "gemma3_text": {**DECODER, **LOCAL, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "mistral": {**DECODER, **LOCAL},
}
PAIRS = [
    (name, attention)
    for name in (*ENCODERS, *DECODERS)
    for attention in ("sdpa", "eager")
    if (name, attention) != ("gemma2", "sdpa")  # transformers refuses it: the soft cap has no place there
]


def make_model(model_type: str, attention: str, settings: dict[str, Any] | None = None) -> nn.Module:
    """Weights of a size that lets attention matter as much as a token's own embedding."""
    is_encoder = model_type in ENCODERS
    config = transformers.AutoConfig.for_model(model_type, **(settings or (ENCODERS | DECODERS)[model_type]))
    auto = transformers.AutoModelForMaskedLM if is_encoder else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_tokenizer(num_ids: int = NUM_IDS, mask: bool = True) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"word{i}" for i in range(5, num_ids))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **({"mask_token": "[MASK]"} if mask else {}))


def make_manifest(task: str, tokenizer: PreTrainedTokenizerFast) -> Manifest:
    return Manifest(task, fingerprint(tokenizer), NUM_IDS, 0, SEQUENCE_TOKENS, 0, (), "", "")


def make_task(kind: str, **settings: Any) -> Task:
    tokenizer, counts = make_tokenizer(), np.ones(NUM_IDS, dtype=np.int64)
    return build_task(TaskSection(kind=kind, **settings), tokenizer, make_manifest(kind, tokenizer), counts)


def task_of(model_type: str) -> Task:
    return make_task("masked_lm" if model_type in ENCODERS else "causal_lm")


def make_sample(documents: list[np.ndarray], key: str = "key") -> Sample:
    sizes = np.array([len(document) for document in documents], dtype=np.uint32)
    return Sample("shard.tar", key, np.concatenate(documents).astype(np.uint16), sizes)


def make_batch(samples: list[Sample]) -> Batch:
    token_ids = np.concatenate([sample.token_ids for sample in samples])
    return collate(samples, (token_ids, np.full(len(token_ids), IGNORE)), pad_id=0, sequence_tokens=SEQUENCE_TOKENS)


@torch.no_grad()
def head_inputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """[B, T, H] states that the head sees."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("model_type", "attention"), PAIRS)
def test_packed_documents_equal_documents_alone(model_type: str, attention: str) -> None:
    """The ground truth knows nothing of us: input_ids of one document, and no other argument."""
    model, task = make_model(model_type, attention), task_of(model_type)
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, NUM_IDS, size) for size in (17, 29, 1, 9)]
    batch = make_batch([make_sample(documents), make_sample(documents[1:2])])
    assert batch.packed
    packed = head_inputs(model, task.model_inputs(batch, model))
    rows = [
        (0, 0, documents[0]),
        (0, 17, documents[1]),
        (0, 46, documents[2]),
        (0, 47, documents[3]),
        (1, 0, documents[1]),
    ]
    for row, start, document in rows:
        alone = head_inputs(model, {"input_ids": torch.tensor(document)[None]})[0]
        torch.testing.assert_close(packed[row, start : start + len(document)], alone, atol=1e-5, rtol=1e-5)
    assert packed.isfinite().all()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_full_single_documents_need_no_mask(model_type: str) -> None:
    model, task = make_model(model_type, "sdpa"), task_of(model_type)
    document = np.random.default_rng(1).integers(5, NUM_IDS, 32)
    batch = make_batch([make_sample([document])])
    inputs = task.model_inputs(batch, model)
    assert "attention_mask" not in inputs
    alone = head_inputs(model, {"input_ids": torch.tensor(document)[None]})
    torch.testing.assert_close(head_inputs(model, inputs), alone, atol=1e-5, rtol=1e-5)


def test_mask_has_the_type_of_the_model() -> None:
    model = make_model("bert", "sdpa").to(torch.bfloat16)
    batch = make_batch([make_sample([np.array([5, 6, 7]), np.array([8, 9])])])
    mask = encoder_inputs(batch, model)["attention_mask"]
    assert mask.dtype == torch.bfloat16
    assert mask.shape == (1, 1, 8, 8)
    assert (mask == 0).sum() == 9 + 4 + 9
    assert head_inputs(model, encoder_inputs(batch, model)).isfinite().all()


def test_gradients_flow_through_rows_of_padding() -> None:
    model = make_model("bert", "sdpa").train()
    nothing = np.empty(0, dtype=np.uint16)
    samples = [make_sample([np.array([5, 6, 7])]), Sample("s", "record 1", nothing, nothing, sound=False)]
    batch = collate(samples, (samples[0].token_ids, np.array([5, 6, 7])), pad_id=0, sequence_tokens=16)
    model(**encoder_inputs(batch, model), labels=batch.labels).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_attention_that_takes_no_mask_is_refused() -> None:
    model = make_model("bert", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    batch = make_batch([make_sample([np.array([5, 6, 7])])])
    with pytest.raises(ConfigError, match=r"flash_attention_2.*sdpa"):
        encoder_inputs(batch, model)


@pytest.mark.parametrize(("model_type", "attention"), PAIRS)
def test_trial_passes_models_that_keep_documents_apart(model_type: str, attention: str) -> None:
    model = make_model(model_type, attention).train()
    check_packing(model, task_of(model_type))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "llama", "mistral"])
def test_trial_passes_half_precision(model_type: str, dtype: torch.dtype) -> None:
    check_packing(make_model(model_type, "sdpa").to(dtype), task_of(model_type))


class Careless:
    """A task that leaves out what keeps documents apart."""

    kind, over_vocabulary = "careless", True

    def __init__(self, left_out: str) -> None:
        self._left_out = left_out

    def label(self, samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        raise AssertionError("the trial needs no labels")

    def model_inputs(self, batch: Batch, model: Any) -> dict[str, Any]:
        inputs = encoder_inputs(batch, model)
        if self._left_out == "window":
            inputs["attention_mask"] = inputs["attention_mask"]["full_attention"]
        else:
            del inputs[self._left_out]
        return inputs


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("model_type", "left_out", "message"),
    [
        ("bert", "attention_mask", "see each other"),
        ("bert", "position_ids", "than the same document alone"),
        ("roberta", "attention_mask", "see each other"),
        ("roberta", "position_ids", "than the same document alone"),
        ("modernbert", "attention_mask", "see each other"),
        ("modernbert", "window", "than the same document alone"),
    ],
)
def test_trial_refuses_what_mixes_documents(model_type: str, left_out: str, message: str, half: bool) -> None:
    model = make_model(model_type, "sdpa").to(torch.bfloat16 if half else torch.float32)
    with pytest.raises(ConfigError, match=message):
        check_packing(model, Careless(left_out))


UNFIT = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize("model_type", UNFIT)
def test_trial_refuses_architectures_that_mix_documents(model_type: str) -> None:
    sizes = {"vocab_size": NUM_IDS, "hidden_size": 32, "num_attention_heads": 4, **UNFIT[model_type]}
    model = make_model(model_type, "eager", sizes)
    with pytest.raises(ConfigError, match=r"see each other.*choose another model"):
        check_packing(model, make_task("causal_lm"))


def test_trial_refuses_a_failing_model_with_its_reason() -> None:
    sizes = {**SIZES, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    config = transformers.DebertaV2Config(**sizes)
    model = transformers.DebertaV2ForMaskedLM(config)
    with pytest.raises(ConfigError, match="DebertaV2ForMaskedLM"):
        check_packing(model, make_task("masked_lm"))


@pytest.mark.parametrize(("model_type", "positions"), [("bert", 66), ("roberta", 64), ("gpt2", 64)])
def test_trial_refuses_sequences_longer_than_the_position_table(model_type: str, positions: int) -> None:
    model = make_model(model_type, "eager")
    check_positions(model, positions)
    with pytest.raises(ConfigError, match=f"has {positions} positions.*{positions + 1} tokens"):
        check_positions(model, positions + 1)


def test_causal_labels_are_the_next_token_of_the_same_document() -> None:
    samples = [make_sample([np.array([5, 6, 7]), np.array([8])]), make_sample([np.array([9, 10])])]
    input_ids, labels = make_task("causal_lm").label(samples, [0, 3])
    assert input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert labels.tolist() == [6, 7, IGNORE, IGNORE, 10, IGNORE]


def test_masked_labels_change_with_the_round_and_repeat() -> None:
    task = make_task("masked_lm", mask_rounds=3)
    sample = make_sample([np.array([1, *range(5, 95), 2])])
    shown = task.label([sample] * 6, range(6))[0].reshape(6, -1).tolist()
    assert shown[:3] == shown[3:]
    assert len({tuple(row) for row in shown[:3]}) == 3
    assert make_task("masked_lm", mask_rounds=3, mask_seed=1).label([sample], [0])[0].tolist() != shown[0]
    assert task.label([replace(sample, key="other")], [0])[0].tolist() != shown[0]
    assert all((row[0], row[-1]) == (1, 2) for row in shown)


def test_random_tokens_are_ordinary_ones() -> None:
    task = make_task("masked_lm", mask_replace=0.0, mask_random=1.0, mask_fraction=0.9)
    samples = [make_sample([np.full(90, 50)], str(number)) for number in range(100)]
    assert set(np.unique(task.label(samples, [0] * 100)[0])) == set(range(5, NUM_IDS))


@pytest.mark.parametrize("kind", ["masked_lm", "causal_lm"])
def test_damaged_samples_have_no_labels(kind: str) -> None:
    nothing = np.empty(0, dtype=np.uint16)
    damaged = Sample("shard.tar", "record 3", nothing, nothing, sound=False)
    sound = make_sample([np.array([5, 6, 7])])
    task = make_task(kind)
    beside = task.label([damaged, sound, damaged], [0, 0, 0])
    assert [part.tolist() for part in beside] == [part.tolist() for part in task.label([sound], [0])]
    assert [len(part) for part in task.label([damaged], [0])] == [0, 0]


def test_kinds_and_model_classes() -> None:
    for kind, task_class in (("masked_lm", MaskedLM), ("causal_lm", CausalLM)):
        task = make_task(kind)
        assert isinstance(task, task_class)
        assert task.kind == kind
        assert hasattr(transformers, MODEL_CLASSES[task.kind])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "causal_lm"}, r"task is causal_lm.*task\.kind is masked_lm"),
        ({"tokenizer": "0123"}, r"fingerprint is 0123.*fingerprint is [0-9a-f]{64}"),
        ({"vocab_size": 100}, r"vocabulary size is 100.*vocabulary size is 99"),
    ],
)
def test_shards_of_another_kind_are_refused_with_both_sides(change: dict[str, Any], message: str) -> None:
    tokenizer = make_tokenizer()
    manifest = replace(make_manifest("masked_lm", tokenizer), **change)
    with pytest.raises(DataError, match=message):
        build_task(TaskSection(kind="masked_lm"), tokenizer, manifest, np.ones(NUM_IDS, dtype=np.int64))


def test_token_counts_of_another_vocabulary_are_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"token_counts\.npy is 98.*99"):
        build_task(TaskSection(kind="masked_lm"), tokenizer, make_manifest("masked_lm", tokenizer), np.ones(98))


def test_masked_lm_needs_a_mask_token() -> None:
    tokenizer = make_tokenizer(mask=False)
    with pytest.raises(ConfigError, match="no mask token"):
        build_task(TaskSection(kind="masked_lm"), tokenizer, make_manifest("masked_lm", tokenizer), np.ones(NUM_IDS))
