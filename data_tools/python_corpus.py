"""About 2 MB of real English that every machine has: the documentation of the Python that runs this.

    python data_tools/python_corpus.py --output corpus.jsonl

Documents are the topics of `help()` and the docstrings of the standard library. Its modules are parsed, never
imported: importing some of them opens windows or starts services. The same Python gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.data.atomic import write_atomically
from engine.errors import DataError
from engine.log import run_main

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "__pycache__"}
MIN_CHARACTERS = 80
"""A shorter docstring says too little to learn from."""
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", required=True, type=Path, help="the .jsonl file to write, one document a line")
    output = parser.parse_args().output
    num_documents, num_characters = write_corpus(output)
    print(f"{output}: {num_documents:,} documents, {num_characters:,} characters")
    return 0


def write_corpus(output: Path) -> tuple[int, int]:
    """Write ``{"text": ...}`` lines. Returns the numbers of documents and of characters.

    Raises DataError when this Python came without its documentation.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts = list(without_copies([*topics(), *docstrings(library)]))
    if not texts:
        raise DataError(
            f"this Python has neither pydoc_data nor sources in {library}; use one that was installed whole "
            "(python.org, pyenv, conda, or the distribution's complete python3 package)"
        )
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lines.encode())
    return len(texts), sum(len(text) for text in texts)


def topics() -> list[str]:
    """What ``help("TOPIC")`` shows, in the order of the topics' names; none where a Python came without it."""
    try:
        from pydoc_data.topics import topics as by_name
    except ImportError:
        return []
    return [by_name[name].strip() for name in sorted(by_name)]


def docstrings(library: Path) -> Iterator[str]:
    """The docstrings of the modules below ``library``, by path and then by line."""
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            yield from docstrings_of(path.read_bytes())


def docstrings_of(source: bytes) -> list[str]:
    """The longer docstrings of one module in the order of their lines; none when it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or a sample of bad code
        return []
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, Documented)), key=_line)
    found = [ast.get_docstring(node) for node in nodes]
    return [text.strip() for text in found if text and len(text.strip()) >= MIN_CHARACTERS and _is_text(text)]


def without_copies(texts: Iterable[str]) -> Iterator[str]:
    """Each text once, the first time it comes; spaces and case do not tell two apart."""
    seen = set()
    for text in texts:
        key = hashlib.sha256(" ".join(text.split()).lower().encode()).digest()
        if key not in seen:
            seen.add(key)
            yield text


def _line(node: Documented) -> int:
    return 0 if isinstance(node, ast.Module) else node.lineno


def _is_text(text: str) -> bool:
    """Lone surrogates cannot be written as UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


if __name__ == "__main__":
    run_main(main)
