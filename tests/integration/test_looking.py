"""Saved models looked at: near words, each token masked alone, predictions for a file, the graph of ONNX."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from data_tools import predict
from engine.errors import ConfigError, DataError
from engine.looking import Look
from engine.nearest import nearest_words
from engine.onnx_export import export_onnx
from tests import labelled, tiny
from tests.launching import ROOT


def test_near_words_are_those_of_the_embeddings(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "model", "masked_lm")
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[tokenizer.convert_tokens_to_ids("w7")] = 2.0 * table[tokenizer.convert_tokens_to_ids("w3")]
    ((near, cosine), *others) = nearest_words(model, tokenizer, ["w3"])[0]
    assert (near, round(cosine, 5)) == ("w7", 1.0)
    assert len(others) == 4
    assert others == sorted(others, key=lambda pair: -pair[1])
    with pytest.raises(ConfigError, match="'nothing' is not one token"):
        nearest_words(model, tokenizer, ["nothing"])


def test_a_table_for_two_saved_models(tmp_path: Path) -> None:
    one, two = (str(tiny.model_folder(tmp_path / name, "masked_lm", seed=seed)) for name, seed in (("a", 0), ("b", 1)))
    words = [sys.executable, "launch/evaluate_student.py", "--model", one, "--teacher", two, "--nearest", "w1", "w2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("w1: ")
    assert [line.split()[0] for line in lines[1:3]] == ["teacher", "student"]
    assert len(lines) == 6


def test_pseudo_perplexity_masks_each_token_alone(tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "model", "masked_lm")
    manifest = tiny.shards(tmp_path / "heldout", "masked_lm", num_samples=8)
    (line,) = Look.at_models({"student": str(folder)}).pseudo_perplexity(str(manifest), max_sequences=2)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    from engine.data.shards import ShardSet

    shards = ShardSet.open(str(manifest))
    total, count = 0.0, 0
    for shard, index in ((0, 0), (1, 0)):  # spread evenly over 4 + 3 + 1 samples
        sample = shards.read(shard, index)
        start = 0
        for length in sample.document_tokens.tolist():
            ids = torch.tensor(sample.token_ids[start : start + length].astype(int))[None]
            start += length
            for place in range(length):
                if int(ids[0, place]) >= len(tiny.SPECIAL):
                    masked = ids.clone()
                    masked[0, place] = 4
                    with torch.no_grad():
                        logits = model(input_ids=masked).logits[0, place]
                    total -= float(logits.log_softmax(0)[ids[0, place]])
                    count += 1
    assert line == f"student  pseudo-perplexity {math.exp(total / count):,.2f} over {count:,} tokens"


@pytest.mark.parametrize("task", ["token_classification", "sequence_classification", "question_answering"])
def test_predictions_for_a_file_are_the_models_and_so_are_the_graphs(task: str, tmp_path: Path) -> None:
    folder = labelled.model_folder(tmp_path / "model", task)
    model = labelled.CLASSES[task].from_pretrained(folder).eval()
    path = labelled.write_data(tmp_path / "input", task, 37, seed=4)
    words = ["--model", str(folder), "--input", str(path), "--sequence-tokens", "40", "--overlap-tokens", "4",
             "--question-tokens", "2", "--batch-examples", "8"]  # fmt: skip
    assert predict.main([*words, "--output", str(tmp_path / "by_torch")]) == 0
    export_onnx(model, folder)
    assert predict.main([*words, "--output", str(tmp_path / "by_onnx"), "--onnx"]) == 0
    said = (tmp_path / "by_torch").read_text()
    assert said == (tmp_path / "by_onnx").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if task == "question_answering":
        assert list(json.loads(said)) == [f"q{number}" for number in range(37)]
        return
    assert len(said.splitlines()) == 37
    for line, given in list(zip(said.splitlines(), labelled.sentences(37, seed=4)))[::9]:
        logits = model(**tokenizer(" ".join(given), return_tensors="pt")).logits[0]
        if task == "token_classification":
            expected = [model.config.id2label[int(row.argmax())] for row in logits[1:-1]]
            assert line == " ".join(given) + "\t" + " ".join(expected)
        else:
            assert json.loads(line)["label"] == model.config.id2label[int(logits.argmax())]


def test_a_model_of_another_task_and_a_graph_that_is_not_there(tmp_path: Path) -> None:
    words = [
        "--input",
        str(labelled.write_data(tmp_path / "input", "token_classification", 3, seed=0)),
        "--output",
        "x",
    ]
    folder = tiny.model_folder(tmp_path / "lm", "masked_lm")
    with pytest.raises(ConfigError, match="its architecture is BertForMaskedLM"):
        predict.main(["--model", str(folder), *words])
    folder = labelled.model_folder(tmp_path / "model", "token_classification")
    with pytest.raises(ConfigError, match="there is no such graph; make it with"):
        predict.main(["--model", str(folder), *words, "--onnx"])


def test_predict_fits_the_model_and_takes_several_files(tmp_path: Path) -> None:
    folder = labelled.model_folder(tmp_path / "model", "token_classification")
    positions = transformers.AutoConfig.from_pretrained(folder).max_position_embeddings
    (tmp_path / "a.tsv").write_text(" ".join(["w1"] * 3 * positions) + "\n")
    (tmp_path / "b.tsv").write_text("w1 w2\n")
    words = ["--model", str(folder), "--input", str(tmp_path / "[ab].tsv"), "--output", str(tmp_path / "out")]
    assert predict.main(words) == 0
    long, short = (tmp_path / "out").read_text().splitlines()
    assert [len(line.split("\t")[1].split()) for line in (long, short)] == [3 * positions, 2]
    with pytest.raises(ConfigError, match=f"--sequence-tokens 999: the model has {positions} positions"):
        predict.main([*words, "--sequence-tokens", "999"])
    for name in "ab":
        (tmp_path / f"{name}.tsv").write_text("\n")
    with pytest.raises(DataError, match="no example in it"):
        predict.main(words)
