"""The texts of the recipes' trial that are not in the data sets as they come: for the encoder, and to match on.

    python benchmarks/recipes/prepare.py DATA FOLDER

DATA holds conll2003-en, wnut17, sst2-glue, squad1-train-slice, tweeteval, wikitext-2 and tinystories-sample, unpacked;
FOLDER gets text/ and the tokenizer of the stories.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

WORDS = re.compile(r"@\w+|#\w+|https?://\S+|\w+(?:'\w+)?|[^\w\s]")
NUM_TRANSFER, NUM_OTHER = 40_000, 12_000
STORY_IDS = 2048


def main() -> None:
    data, folder = Path(sys.argv[1]), Path(sys.argv[2])
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    news = list(sentences(data / "conll2003-en" / "bio2" / "train.txt"))
    wiki = [line.strip() for line in (data / "wikitext-2" / "wiki.train.tokens").open() if line.strip(" =\n")]
    wiki = [line for line in wiki if not line.startswith("=")]
    write(text / "wiki.txt", wiki)
    write(text / "conll.txt", news)
    write(text / "sst.txt", (line.split("\t")[0] for line in rows(data / "sst2-glue" / "train.tsv")))
    write(text / "sst-phrases.tsv", rows(data / "sst2-glue" / "train.tsv"))
    write(text / "squad.txt", paragraphs(data / "squad1-train-slice" / "squad1-train-slice.json"))
    transfer = news + [f"{part} ." for line in wiki for part in line.split(" . ") if 4 <= len(part.split()) <= 60]
    random.Random(0).shuffle(transfer)
    write(text / "ner-transfer.tsv", transfer[:NUM_TRANSFER])
    tweets = list(sentences(data / "wnut17" / "wnut17train.conll"))
    for name in ("emotion", "irony"):
        for part in ("train", "val"):
            path = data / "tweeteval" / name / f"{part}_text.txt"
            tweets += [" ".join(WORDS.findall(line)) for line in path.open()]
    tweets += transfer[:NUM_OTHER]
    random.Random(0).shuffle(tweets)
    write(text / "wnut-transfer.tsv", tweets)
    stories = json.loads((data / "tinystories-sample" / "tinystories_1000.json").read_text())
    write(text / "stories.txt", (" ".join(story.split()) for story in stories))
    train_tokenizer(text / "stories.txt", folder / "wordpieces")


def sentences(path: Path) -> Iterator[str]:
    """Of a CoNLL file: its words, without the tags."""
    words: list[str] = []
    for line in [*path.open(), "\n"]:
        if line.strip():
            if not line.startswith("-DOCSTART-"):
                words.append(line.split()[0])
        elif words:
            yield " ".join(words)
            words = []


def rows(path: Path) -> list[str]:
    """Of a table: all but its header."""
    return [line.rstrip("\n") for line in path.open()][1:]


def paragraphs(path: Path) -> Iterator[str]:
    for document in json.loads(path.read_text())["data"]:
        for paragraph in document["paragraphs"]:
            questions = " ".join(each["question"] for each in paragraph["qas"])
            yield " ".join(f"{paragraph['context']} {questions}".split())


def write(path: Path, lines: Iterator[str] | list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines if line.strip()))


def train_tokenizer(text: Path, folder: Path) -> None:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train([str(text)], vocab_size=STORY_IDS, show_progress=False, special_tokens=special)
    BertTokenizer(tokenizer_object=pieces._tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
