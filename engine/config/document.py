"""docs/config.md, from the sections themselves: python -m engine.config.document > docs/config.md"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from engine.config import stages
from engine.config.cache import CacheSection, CodecSection
from engine.config.run import RunConfig
from engine.config.section import Section
from engine.config.terms import AnyTerm, Ramp

_INTRODUCTION = """# The run YAML

Made from the classes in `engine/config` by `python -m engine.config.document > docs/config.md`; do not edit by hand.

One file says what a run does; the DeepSpeed JSON named by `zero` says how it is sharded, with `"auto"` for every number
that the run owns. Unknown, misspelt and repeated keys are errors with their line. On the command line
`key.path=value` replaces a value, and the items of a list go by index: `losses.0.weight=2`.
"""
_STAGES = f"""## stages

{stages.__doc__.partition(chr(10))[2].strip() if stages.__doc__ else ""}
"""
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))


def document() -> str:
    """The page, as Markdown."""
    parts = [_INTRODUCTION]
    plain: dict[str, FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        if (section := _section_in(field.annotation)) is not None:
            parts.append(_section(f"## {name}", section))
            if section is CacheSection:
                parts += [_kinds("###", codec) for codec in get_args(get_args(CodecSection)[0])]
        elif name != "losses":
            plain[name] = field
    parts.append("\n".join(_losses()))
    parts.append(_STAGES)
    for name, field in plain.items():
        parts.append(
            f"## {name}\n\n{_text(field)} {_type(field.annotation).capitalize()}; default {_default(field)}.\n"
        )
    return "\n".join(parts)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also one that may be left out."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, Section):
            return each
    return None


def _losses() -> Iterator[str]:
    union = get_args(AnyTerm)[0]
    yield f"## losses\n\n{_text(RunConfig.model_fields['losses'])} A list, each item with its `kind`:\n"
    for term in get_args(union):
        yield _kinds("###", term)
    yield _section("### ramp", Ramp)


def _kinds(level: str, section: type[Section]) -> str:
    """A section that is chosen by its ``kind``."""
    kinds = " and ".join(f"`{kind}`" for kind in get_args(section.model_fields["kind"].annotation))
    return _section(f"{level} {kinds}", section, leave_out=("kind",))


def _section(heading: str, section: type[Section], leave_out: tuple[str, ...] = ()) -> str:
    lines = [
        heading,
        "",
        " ".join((section.__doc__ or "").split()),
        "",
        "| key | value | default | |",
        "|---|---|---|---|",
    ]
    for name, field in section.model_fields.items():
        if name not in leave_out:
            lines.append(
                f"| `{name}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {_text(field)} |"
            )
    return "\n".join([*lines, ""])


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.default
    if isinstance(value, Section) and hasattr(value, "kind"):
        return f"`{value.kind}`"
    if isinstance(value, Section) or value is None:
        return "none"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _type(annotation: Any, metadata: Any = ()) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0], inner[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(each) for each in inner if each is not NoneType)
    if origin is tuple:
        items = [_type(each) for each in inner if each is not Ellipsis]
        return f"list of {items[0]}" if Ellipsis in inner else f"list of {len(items)}: {items[0]}"
    if origin is dict:
        return "section"
    if isinstance(annotation, type) and issubclass(annotation, Section) and "kind" in annotation.model_fields:
        return " or ".join(f"[`{kind}`](#{kind})" for kind in get_args(annotation.model_fields["kind"].annotation))
    if annotation is Ramp:
        return "[ramp](#ramp)"
    return _PLAIN[annotation] + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    flat = [each for item in metadata for each in (item.metadata if isinstance(item, FieldInfo) else [item])]
    words = [
        f"{words} {getattr(each, name):g}" for each in flat for kind, name, words in _BOUNDS if isinstance(each, kind)
    ]
    return f", {' and '.join(words)}" if words else ""


if __name__ == "__main__":
    print(document(), end="")
