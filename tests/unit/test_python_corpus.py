from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from data_tools import python_corpus
from data_tools.python_corpus import docstrings, docstrings_of, without_copies, write_corpus
from data_tools.readers import read_documents
from engine.errors import DataError

LONG = "A sentence that is long enough to be worth learning from, as a docstring should be. "


def test_the_corpus_of_this_python_is_large_and_without_copies(tmp_path: Path) -> None:
    num_documents, num_characters = write_corpus(tmp_path / "a.jsonl")
    texts = list(read_documents(str(tmp_path / "a.jsonl"), text_column="text", one_per_line=False))
    assert len(texts) == len(set(texts)) == num_documents > 3000
    assert sum(map(len, texts)) == num_characters > 1_500_000
    assert min(map(len, texts)) >= python_corpus.MIN_CHARACTERS


def test_docstrings_come_in_the_order_of_their_lines() -> None:
    source = (
        f'"""module {LONG}"""\nclass A:\n    """class {LONG}"""\n'
        f'    async def f(self):\n        """inner {LONG}"""\n\n        def short():\n            """Too short."""\n'
        f'def g():\n    """last {LONG}"""\n'
    )
    assert [text.split()[0] for text in docstrings_of(source.encode())] == ["module", "class", "inner", "last"]


@pytest.mark.parametrize("source", [b"print 'Python 2'", b"\xff\xfe", b"def f(:", b"a = 1\0"])
def test_what_does_not_parse_is_passed_over(source: bytes) -> None:
    assert docstrings_of(source) == []


def test_lone_surrogates_are_left_out() -> None:
    assert docstrings_of(f'"""{LONG}\\ud800"""'.encode()) == []


def test_modules_are_parsed_never_imported_and_tests_are_left_out(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", "test/c.py", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'"""{name} {LONG}"""\nraise SystemExit("imported")\n')
    assert [text.split()[0] for text in docstrings(tmp_path)] == ["a.py", "b.py"]


def test_copies_differ_in_more_than_spaces_and_case() -> None:
    assert list(without_copies(["One  text\n", "one text", "another", "One Text."])) == [
        "One  text\n",
        "another",
        "One Text.",
    ]


def test_a_python_without_documentation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="neither pydoc_data nor sources"):
        write_corpus(tmp_path / "out" / "corpus.jsonl")
    assert not (tmp_path / "out").exists()


def test_lines_are_json_objects_with_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_corpus, "topics", lambda: ["Ein Käfer, 虫\nof two lines"])
    monkeypatch.setattr(python_corpus, "docstrings", lambda library: iter(()))
    assert write_corpus(tmp_path / "new" / "c.jsonl") == (1, 25)
    lines = (tmp_path / "new" / "c.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "Ein Käfer, 虫\nof two lines"}]
