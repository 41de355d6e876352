"""Labelled examples to shards: what each task's samples hold, and what is said of examples that cannot be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data_tools import build_shards
from engine.data.shards import ShardSet
from engine.errors import DataError
from engine.schema import Sample
from tests.sharding import shards_of

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["ann", "lee", "lives", "in", "new", "york", "##s", "##ton", "hous", "rome", "and", "?", "who", ".", "where"]
VOCABULARY = {token: index for index, token in enumerate(SPECIAL + PIECES)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordPiece: houston is two tokens, and a lone accent is none."""
    inner = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
             "mask_token": "[MASK]"}  # fmt: skip
    folder = tmp_path_factory.mktemp("wordpiece")
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return folder


class Builder:
    def __init__(self, tokenizer: Path, folder: Path) -> None:
        self.tokenizer, self.folder = tokenizer, folder

    def __call__(self, task: str, name: str, content: str | bytes, *more: str, tokens: int = 16) -> list[Sample]:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        words = ["--task", task, "--input", str(path), "--tokenizer", str(self.tokenizer), "--output",
                 str(self.folder / "shards"), "--sequence-tokens", str(tokens), "--workers", "1", *more]  # fmt: skip
        assert build_shards.main(words) == 0
        self.shards = ShardSet.open(str(self.folder / "shards" / "manifest.json"))
        return [self.shards.read(0, index) for index in range(self.shards.manifest.num_samples)]


@pytest.fixture
def build(tokenizer: Path, tmp_path: Path) -> Builder:
    return Builder(tokenizer, tmp_path)


def labels(sample: Sample) -> list[int]:
    assert sample.annotation is not None
    return sample.annotation.labels.tolist()


CONLL = "-DOCSTART- -X- O\n\nAnn NNP B-PER\nlives VB O\nin IN O\nHouston NNP B-LOC\n\n\nRome NNP B-LOC\n"


def test_conll_labels_stand_at_the_first_token_of_each_word(build: Builder) -> None:
    first, second = build("token_classification", "train.conll", CONLL)
    assert build.shards.manifest.labels == ("O", "B-LOC", "B-PER")
    assert build.shards.manifest.has_labels
    words = ["[CLS]", "ann", "lives", "in", "hous", "##ton", "[SEP]"]
    assert first.token_ids.tolist() == [VOCABULARY[word] for word in words]
    assert labels(first) == [0, 2 + 2, 2 + 0, 2 + 0, 2 + 1, 0, 0]
    assert labels(second) == [0, 2 + 1, 0]


def test_a_line_of_words_and_tags_and_a_line_of_words_alone(build: Builder, tmp_path: Path) -> None:
    (tmp_path / "labels.tsv").write_text("B-PER\nO\n")
    (only,) = build("token_classification", "train.tsv", "Ann lives\tB-PER O\n")
    assert build.shards.manifest.labels == ("B-PER", "O")
    assert labels(only) == [0, 2, 3, 0]
    (only,) = build("token_classification", "transfer.tsv", "Ann lives\n", "--overwrite")
    assert not build.shards.manifest.has_labels
    assert labels(only) == [0, 1, 1, 0]


def test_a_word_that_the_tokenizer_drops_keeps_its_label(build: Builder) -> None:
    (only,) = build("token_classification", "a.tsv", "Ann \u0301 lives\tB-PER I-PER O\n")
    assert only.token_ids.tolist()[2] == VOCABULARY["[UNK]"]
    assert [label for label in labels(only) if label] == [3, 4, 2]


def test_a_long_sentence_is_cut_between_entities(build: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    words = "ann lives in new york and ann lives in rome"
    tags = "B-PER O O B-LOC I-LOC O B-PER O O B-LOC"
    samples = build("token_classification", "a.tsv", f"{words}\t{tags}\n", tokens=10)
    assert "1 examples were longer than 10 tokens and were cut" in capsys.readouterr().out
    kept = [label for sample in samples for label in labels(sample) if label]
    names = build.shards.manifest.labels
    assert [names[label - 2] for label in kept] == tags.split()
    for sample in samples:
        starts = [label for label in labels(sample) if label]
        assert not names[starts[0] - 2].startswith("I-"), "no entity is cut in two"


def test_texts_and_pairs(build: Builder) -> None:
    table = "text,other,label\nann lives,in rome,yes\nann,rome,no\n"
    first, _ = build("sequence_classification", "a.csv", table, "--second-column", "other")
    assert build.shards.manifest.labels == ("no", "yes")
    assert first.annotation is not None
    assert first.annotation.piece_tokens.tolist() == [4, 3]
    assert labels(first) == [2 + 1]
    (only,) = build("sequence_classification", "b.tsv", "ann lives\t1\n", "--columns", "text,label", "--overwrite")
    assert only.annotation is not None
    assert only.annotation.piece_tokens.tolist() == [4]


def squad(*questions: dict[str, Any], context: str = "Ann Lee lives in New York and Houston.") -> str:
    return json.dumps(
        {"version": "2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}]}
    )


LONG = "Ann Lee lives in New York and Houston. Who lives in Rome and in Houston?"
SHORT = ("--overlap-tokens", "2", "--question-tokens", "3")
WHERE = {"id": "q", "question": "where?", "answers": [{"text": "New York", "answer_start": 17}]}


def test_an_answer_is_a_span_of_tokens_in_each_window_that_holds_it(build: Builder) -> None:
    samples = build("question_answering", "a.json", squad(WHERE, context=LONG), *SHORT, tokens=16)
    found = 0
    for sample in samples:
        start, end = (label - 2 for label in labels(sample))
        tokens = sample.token_ids.tolist()
        if start:
            found += 1
            assert tokens[start : end + 1] == [VOCABULARY["new"], VOCABULARY["york"]]
        else:
            assert end == 0
            assert VOCABULARY["new"] not in tokens or VOCABULARY["york"] not in tokens
        assert sample.annotation is not None
        example = json.loads(sample.annotation.example)
        assert (example["id"], example["answers"]) == ("q", ["New York"])
        first = example["first"]
        if example["ends"][0] - example["starts"][0] == 3:
            assert tokens[first] == VOCABULARY[example["context"][example["starts"][0] : example["ends"][0]].lower()]
    assert found >= 1
    assert len(samples) > 1


def test_questions_without_an_answer_and_without_known_ones(build: Builder) -> None:
    impossible = {"id": "n", "question": "who?", "answers": [], "is_impossible": True}
    samples = build("question_answering", "a.json", squad(WHERE, impossible), *SHORT, tokens=32)
    assert labels(samples[1]) == [2, 2]
    (only,) = build("question_answering", "b.json", squad(WHERE), *SHORT, "--unlabelled", "--overwrite", tokens=32)
    assert labels(only) == [1, 1]
    assert not build.shards.manifest.has_labels


def test_any_number_of_processes_and_a_split_give_the_same(build: Builder, tokenizer: Path, tmp_path: Path) -> None:
    lines = "".join(f"ann {'and ' * count}lee\tB-PER {'O ' * count}B-PER\n" for count in range(10)) * 15
    build("token_classification", "a.tsv", lines, "--split-heldout", "0.6")
    words = ["--task", "token_classification", "--input", str(tmp_path / "a.tsv"), "--tokenizer", str(tokenizer),
             "--sequence-tokens", "16", "--split-heldout", "0.6", "--workers", "2"]  # fmt: skip
    assert build_shards.main([*words, "--output", str(tmp_path / "two")]) == 0
    assert shards_of(tmp_path / "shards") == shards_of(tmp_path / "two")
    sides = [
        ShardSet.open(str(tmp_path / "two" / name)).manifest for name in ("manifest.json", "heldout/manifest.json")
    ]
    assert sum(side.num_samples for side in sides) == 150


@pytest.mark.parametrize(
    ("task", "name", "content", "words"),
    [
        ("token_classification", "a.tsv", "ann lives\tO O\nann lives\tO\n", "a.tsv:2: 2 words but 1 tags"),
        ("token_classification", "a.tsv", "ann\tO\nann lives\n", "a.tsv:2: no labels, unlike the examples before"),
        ("token_classification", "a.conll", "ann O\nlives VB O\n", "a.conll:2: 3 columns, but 2 in the line before"),
        ("token_classification", "a.tsv", "", "no examples"),
        ("token_classification", "a.tsv", b"ann\tO\n\xfflives\tO\n", "a.tsv:2: byte 0xff at column 1 is not UTF-8"),
        ("sequence_classification", "a.csv", "txt,label\nann,1\n", "a.csv:2: no column 'text'; found ['label', 'txt']"),
        ("sequence_classification", "a.csv", "text,label\n ,1\n", "a.csv:2: column 'text' holds no text"),
        ("question_answering", "a.json", "[]", "not a SQuAD file"),
        ("question_answering", "a.json", squad({"id": "q", "question": "?"}), "question q: no answers"),
        ("question_answering", "a.json", squad(WHERE | {"answers": [{"text": "Rome", "answer_start": 17}]}),
         "its answer 'Rome' is not at character 17, where 'New ' stands"),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_right(build: Builder, task: str, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(DataError) as caught:
        build(task, name, content)
    assert words in str(caught.value), str(caught.value)


def test_a_label_that_is_not_among_the_labels(build: Builder, tmp_path: Path) -> None:
    (tmp_path / "labels.tsv").write_text("O\nB-PER\n")
    with pytest.raises(DataError, match=r"a\.tsv:2: label 'B-LOC' is not among the labels: O, B-PER"):
        build("token_classification", "a.tsv", "ann\tB-PER\nrome\tB-LOC\n")
