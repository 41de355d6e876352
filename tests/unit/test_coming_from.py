"""docs/coming_from.md names keys, terms and options that exist."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from engine import Distiller
from engine.config.mistakes import sections_in
from engine.config.run import RunConfig
from engine.config.section import Section
from engine.config.terms import AnyTerm

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "coming_from.md"
TERMS = {
    kind: term for term in get_args(get_args(AnyTerm)[0]) for kind in get_args(term.model_fields["kind"].annotation)
}
PROJECTS = 5


def rows() -> Iterator[tuple[str, str]]:
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if len(cells) >= 2 and cells[0] != "flag" and not set(cells[0]) <= set("-|"):
            yield cells[0], cells[1]


def named() -> list[str]:
    return sorted({name for _, here in rows() for name in re.findall(r"`([^`]+)`", here)})


@cache
def help_of(script: str) -> str:
    (path,) = (ROOT / folder / script for folder in ("launch", "data_tools") if (ROOT / folder / script).is_file())
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


def test_each_project_has_its_table() -> None:
    assert PAGE.read_text().count("\n## ") == PROJECTS
    assert len(list(rows())) > 100
    for flag, here in rows():
        assert "`" in here or here == "not needed", f"{flag}: {here}"


@pytest.mark.parametrize("name", named())
def test_what_is_named_exists(name: str) -> None:
    if ".py " in name:
        script, option = name.split(" ")
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(script)), name
    elif match := re.fullmatch(r"losses\[(\w+)\]\.(\w+)", name):
        assert match[2] in TERMS[match[1]].model_fields, name
    elif name.startswith("Distiller("):
        assert "callbacks" in inspect.signature(Distiller).parameters
    else:
        section: type[Section] = RunConfig
        *above, last = name.split(".")
        for part in above:
            (section,) = set(sections_in(section.model_fields[part].annotation))
        assert last in section.model_fields, name
