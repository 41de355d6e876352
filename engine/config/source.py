"""A run YAML as plain data that remembers the line of every key, with command-line overrides laid over it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 5e-4 as a number, as YAML 1.2 does; YAML 1.1 wants 5.0e-4."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def dotted(path: KeyPath) -> str:
    """losses.0.weight"""
    return ".".join(str(part) for part in path)


@dataclass
class Source:
    """Plain data and, for each path in it, where it was given ("run.yaml:12", "override `a.b=1`")."""

    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where ``path`` or the nearest section around it was given, ready to stand before a message."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return f"{self.places[path[:length]]}: "
        return ""

    def overrides_below(self, path: KeyPath) -> list[str]:
        """Overrides that changed something inside the section at ``path``."""
        return [text for changed, text in self.overrides.items() if len(changed) > len(path) == _shared(changed, path)]

    def override(self, text: str) -> None:
        """Set one value from ``key.path=value``; the value is YAML and list items go by index.

        Raises ConfigError when the path leads through something that is no section, or past a list's end.
        """
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")):
            raise ConfigError(f"override `{text}`: expected key.path=value, such as run.num_steps=100")
        place = f"override `{text}`"
        here: Any = self.data
        path: KeyPath = ()
        for part in name.split("."):
            if path:
                here = self._enter(here, path, place)
            path = (*path, _key_of(here, part, path, place))
        here[path[-1]] = _parse(value, place)
        self._note(path, place, text)

    def _enter(self, here: Any, path: KeyPath, place: str) -> Any:
        """The section or list at ``path``, whose parent is ``here``; made when absent."""
        value = here.get(path[-1]) if isinstance(here, dict) else here[path[-1]]
        if value is None:
            value = here[path[-1]] = {}
            self.places.setdefault(path, place)
        if not isinstance(value, dict | list):
            raise ConfigError(f"{place}: {dotted(path)} is {value!r}, not a section; set it as a whole")
        return value

    def _note(self, path: KeyPath, place: str, text: str) -> None:
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        self.places[path] = place
        self.overrides.pop(path, None)
        self.overrides[path] = text


def _shared(longer: KeyPath, path: KeyPath) -> int:
    return len(path) if longer[: len(path)] == path else -1


def _key_of(here: Any, part: str, path: KeyPath, place: str) -> str | int:
    if not isinstance(here, list):
        return part
    if not part.isdigit() or int(part) >= len(here):
        raise ConfigError(f"{place}: {dotted(path)} is a list of {len(here)}; give an index from 0 to {len(here) - 1}")
    return int(part)


def _parse(text: str, place: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as problem:
        raise ConfigError(f"{place}: the value is not YAML: {' '.join(str(problem).split())}") from problem


class _Reader:
    """Turns YAML nodes into plain data, noting the line of each key and list item, and each mistake on the way."""

    def __init__(self, loader: _Loader, name: str) -> None:
        self.loader, self.name = loader, name
        self.places: dict[KeyPath, str] = {}
        self.mistakes: list[str] = []
        self._open: set[int] = set()

    def at(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.loader.construct_object(node)
        if id(node) in self._open:
            raise ConfigError(f"{self.at(node)}: {dotted(path)}: an alias that holds itself")
        self._open.add(id(node))
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self._open.discard(id(node))
        return value

    def _sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            inner = (*path, index)
            self.places[inner] = self.at(item)
            items.append(self.read(item, inner))
        return items

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, inner = key_node.value, (*path, str(key_node.value))
            if key_node.tag != "tag:yaml.org,2002:str":
                self.mistakes.append(f"{self.at(key_node)}: {dotted(inner)}: a key must be plain text (no << merges)")
            elif key in content:
                first = self.places[inner].rpartition(":")[2]
                self.mistakes.append(f"{self.at(key_node)}: {dotted(inner)}: given twice, first on line {first}")
            else:
                self.places[inner] = self.at(key_node)
                content[key] = self.read(value_node, inner)
        return content


def read_yaml(path: str) -> Source:
    """Read ``path``. Raises ConfigError, with lines, for what is no YAML, no mapping, or holds a key twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(
            f"{path}: cannot read the run YAML: {getattr(problem, 'strerror', None) or problem}"
        ) from problem
    loader = _Loader(text)
    reader = _Reader(loader, path)
    try:
        node = loader.get_single_node()
        data = None if node is None else reader.read(node, ())
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {problem.problem}") from problem
    except (yaml.YAMLError, ValueError) as problem:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(problem).split())}") from problem
    finally:
        loader.dispose()
    if reader.mistakes:
        raise ConfigError("\n".join(reader.mistakes))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections such as run:, task: and student:, found {type(data).__name__}")
    return Source(data, {(): f"{path}:1", **reader.places})
