"""Labelled examples out of files, one at a time, with file and line named when something is wrong with one.

token_classification     .tsv: words<TAB>tags, both split at blanks, or words alone; any other ending: CoNLL, a word a
                         line with its tag in the last column, sentences apart by blank lines
sequence_classification  tables as for text, with columns for a second text and a label; .tsv may have no header
question_answering       JSON of SQuAD 1.1 or 2.0
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.readers import lines_of, read_rows
from engine.errors import DataError

DOCUMENT_START = "-DOCSTART-"
OUTSIDE = "O"


@dataclass(frozen=True)
class Tagged:
    """A sentence; its tags, one a word, where they are known."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.tags

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True)
class Classified:
    """A text or a pair of texts; its label where it is known."""

    where: str
    texts: tuple[str, ...]
    label: str | None

    @property
    def labels(self) -> tuple[str, ...] | None:
        return None if self.label is None else (self.label,)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


@dataclass(frozen=True)
class Question:
    """A question and the context that may hold its answer."""

    where: str
    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None
    """text and first character in the context; empty for a question that has none, None where it is not known"""

    labels = None

    @property
    def text(self) -> str:
        """What a held-out part is cut by: questions about one context stay together."""
        return self.context


Example = Tagged | Classified | Question


@dataclass(frozen=True)
class Columns:
    """Where a table has what."""

    text: str = "text"
    second: str | None = None
    label: str = "label"
    names: tuple[str, ...] | None = None
    """of a table without a header"""


def read_examples(task: str, path: str, columns: Columns, *, unlabelled: bool) -> Iterator[Example]:
    """The examples of a file in order; ``unlabelled`` leaves out labels that are there. Raises DataError."""
    if task == "question_answering":
        return _read_squad(path, unlabelled)
    if task == "sequence_classification":
        return _read_classified(path, columns, unlabelled)
    if path.endswith((".tsv", ".tsv.gz", ".tsv.zst")):
        return _read_tagged_lines(path, unlabelled)
    return _read_conll(path, unlabelled)


def _read_tagged_lines(path: str, unlabelled: bool) -> Iterator[Tagged]:
    for number, line in enumerate(lines_of(path), 1):
        where = f"{path}:{number}"
        columns = line.rstrip("\r\n").split("\t")
        words = tuple(columns[0].split())
        if not words:
            continue
        if len(columns) > 2:
            raise DataError(f"{where}: {len(columns)} columns; expected words<TAB>tags, or words alone")
        tags = tuple(columns[1].split()) if len(columns) == 2 else None
        if tags is not None and len(tags) != len(words):
            raise DataError(f"{where}: {len(words)} words but {len(tags)} tags; expected a tag for each word")
        yield Tagged(where, words, None if unlabelled else tags)


def _read_conll(path: str, unlabelled: bool) -> Iterator[Tagged]:
    rows: list[list[str]] = []
    first = 1
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            row = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            if rows and len(row) != len(rows[0]):
                raise DataError(f"{path}:{number}: {len(row)} columns, but {len(rows[0])} in the line before")
            if not rows:
                first = number
            rows.append(row)
        elif rows:
            yield from _sentence(f"{path}:{first}", rows, unlabelled)
            rows = []
    if rows:
        yield from _sentence(f"{path}:{first}", rows, unlabelled)


def _sentence(where: str, rows: Sequence[Sequence[str]], unlabelled: bool) -> Iterator[Tagged]:
    if rows[0][0] == DOCUMENT_START:
        return
    has_tags = len(rows[0]) > 1 and not unlabelled
    yield Tagged(where, tuple(row[0] for row in rows), tuple(row[-1] for row in rows) if has_tags else None)


def _read_classified(path: str, columns: Columns, unlabelled: bool) -> Iterator[Classified]:
    wanted = [columns.text] + ([columns.second] if columns.second else [])
    for where, row in read_rows(path, columns.names):
        missing = [name for name in wanted if not isinstance(row, dict) or name not in row]
        if missing:
            found = sorted(map(str, row)) if isinstance(row, dict) else row
            raise DataError(
                f"{where}: no column {missing[0]!r}; found {found!r}; name the columns with --text-column, "
                "--second-column and --label-column, or those of a file without a header with --columns"
            )
        texts = tuple(_text(row[name], name, where) for name in wanted)
        label = row.get(columns.label)
        yield Classified(where, texts, None if unlabelled or label in (None, "") else str(label))


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: column {name!r} holds no text")
    return value


def _read_squad(path: str, unlabelled: bool) -> Iterator[Question]:
    try:
        content = json.loads("".join(lines_of(path)))
        documents = [paragraph for document in content["data"] for paragraph in document["paragraphs"]]
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(
            f"{path}: not a SQuAD file ({problem!r}); expected data, paragraphs, context, qas, answers"
        ) from problem
    for number, paragraph in enumerate(documents):
        for entry in paragraph.get("qas", ()):
            where = f"{path}, paragraph {number}, question {entry.get('id', 'without id')}"
            try:
                answers = None if unlabelled else _answers(entry, paragraph["context"], where)
                yield Question(where, str(entry["id"]), entry["question"].strip(), paragraph["context"], answers)
            except (KeyError, TypeError, AttributeError) as problem:
                raise DataError(f"{where}: {problem!r} is missing or of another type") from problem


def _answers(entry: dict[str, Any], context: str, where: str) -> tuple[tuple[str, int], ...]:
    answers = tuple((answer["text"], int(answer["answer_start"])) for answer in entry.get("answers", ()))
    if not answers and not entry.get("is_impossible"):
        raise DataError(
            f"{where}: no answers, and not marked is_impossible; for data without answers give --unlabelled"
        )
    for text, start in answers:
        if context[start : start + len(text)] != text:
            found = context[start : start + len(text)]
            raise DataError(f"{where}: its answer {text!r} is not at character {start}, where {found!r} stands")
    return () if entry.get("is_impossible") else answers
