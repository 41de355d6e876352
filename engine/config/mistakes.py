"""Words for what pydantic found wrong in a run: place, path, what was expected, the nearest valid name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from engine.config.run import RunConfig
from engine.config.section import Section
from engine.config.source import KeyPath, Source, dotted

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "finite_number": "a finite number",
}


def mistakes(error: ValidationError, source: Source) -> list[str]:
    """One line for each mistake in ``source``, told once and at the deepest place it can be pinned to."""
    found: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_path_of(detail, source.data), []).append(detail)
    deepest = [path for path in found if not any(len(other) > len(path) == _common(other, path) for other in found)]
    return [
        f"{source.place(path)}{_name(path)}{_words(path, found[path], source)}{_term(path, source.data)}"
        for path in deepest
    ]


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean `weight`?", or nothing when no valid name is near."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return f"; did you mean `{close[0]}`?" if close else ""


def _common(longer: KeyPath, path: KeyPath) -> int:
    return len(path) if longer[: len(path)] == path else -1


def _path_of(detail: ErrorDetails, data: Any) -> KeyPath:
    """The error's place in the user's own keys: pydantic's union tags are left out."""
    path: KeyPath = ()
    last = len(detail["loc"]) - 1
    for position, part in enumerate(detail["loc"]):
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if inside:
            data = data[part]
        if inside or (detail["type"] == "missing" and position == last):
            path = (*path, part)
    return (*path, "kind") if detail["type"].startswith("union_tag") else path


def _name(path: KeyPath) -> str:
    return f"{dotted(path)}: " if path else ""


def _term(path: KeyPath, data: Any) -> str:
    """Which kind of term the mistake is in: an index alone says little."""
    if len(path) < 2 or path[0] != "losses" or path[-1] == "kind":
        return ""
    term = data["losses"][path[1]]
    return f" (a {term['kind']} term)" if isinstance(term, dict) else ""


def _words(path: KeyPath, details: list[ErrorDetails], source: Source) -> str:
    detail = details[0]
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return _unknown_key(path, source.data)
    if kind == "missing":
        return f"missing{_documentation(path, source.data)}"
    if kind.startswith("union_tag"):
        kinds = [name for section in _sections_at(path[:-1], source.data, any_kind=True) for name in _kinds(section)]
        given = value.get("kind")
        near = nearest(str(given), kinds, cutoff=0.4)
        unknown = "missing" if given is None else f"unknown kind {_shown(given)}{near}"
        return f"{unknown}{'' if near else ';'} the kinds are {', '.join(kinds)}"
    if kind == "value_error":
        changed = source.overrides_below(path)
        after = f" (after override {', '.join(f'`{text}`' for text in changed)})" if changed else ""
        return detail["msg"].removeprefix("Value error, ") + after
    expected = " or ".join(dict.fromkeys(_expectation(each) for each in details))
    near = nearest(value, _allowed(details)) if isinstance(value, str) else ""
    quotable = expected == "text" and isinstance(value, int | float)
    quote = "; put it in quotes" if quotable else ""
    return f"expected {expected}, found {_shown(value)}{near}{quote}"


def _expectation(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        return f"one of {', '.join(_allowed([detail]))}" if len(_allowed([detail])) > 1 else _allowed([detail])[0]
    if detail["type"] == "string_pattern_mismatch":
        return f"text that matches {detail['ctx']['pattern']}"
    plain = detail["msg"].removeprefix("Input should be ").removeprefix("Tuple should have ").partition(" after ")[0]
    compared = plain.startswith(("greater", "less"))
    return _EXPECTED.get(detail["type"], f"a value {plain}" if compared else plain[0].lower() + plain[1:])


def _allowed(details: list[ErrorDetails]) -> list[str]:
    words = " or ".join(each["ctx"]["expected"] for each in details if each["type"] == "literal_error")
    return [word.strip(" '") for word in words.replace(" or ", ", ").split(",") if word]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(path: KeyPath, data: Any) -> str:
    key = str(path[-1])
    sections = _sections_at(path[:-1], data)
    valid = list(dict.fromkeys(name for section in sections for name in section.model_fields))
    if near := nearest(key, valid):
        return f"unknown key{near}"
    elsewhere = [
        f"{top}.{key}"
        for top in RunConfig.model_fields
        for section in _sections_at((top,), data, any_kind=True)
        if top != "losses" and key in section.model_fields
    ]
    if elsewhere:
        return f"unknown key here; did you mean `{elsewhere[0]}`?"
    return f"unknown key; valid here: {', '.join(valid)}"


def _documentation(path: KeyPath, data: Any) -> str:
    for section in _sections_at(path[:-1], data):
        if path[-1] in section.model_fields:
            described = section.model_fields[str(path[-1])].description
            return f"; {' '.join(described.split())}" if described else ""
    return ""


def _sections_at(path: KeyPath, data: Any, *, any_kind: bool = False) -> list[type[Section]]:
    """Section classes that may lie at ``path``; of a list of terms, the one of the kind given there."""
    sections: list[type[Section]] = [RunConfig]
    for part in path:
        data = _inside(data, part)
        if isinstance(part, str):
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [found for field in fields for found in sections_in(field.annotation)]
        elif not any_kind and isinstance(data, dict):
            sections = [section for section in sections if data.get("kind") in _kinds(section)]
    return sections


def _inside(data: Any, part: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) and part < len(data) else None


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def _kinds(section: type[Section]) -> tuple[str, ...]:
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()
