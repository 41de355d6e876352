"""Secrets, taken out of all text that leaves a process: logs, dumps of settings, reports, records of commands.

What is taken for a secret: the values of variables such as WANDB_API_KEY, HF_TOKEN and AWS_SECRET_ACCESS_KEY, as they
are or percent-encoded; user and password in an address or after curl's -u; signatures and keys in a query; what an
Authorization header says; the values of key=value words and options whose names say so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"
MIN_CHARACTERS = 6
"""A shorter value of a variable is no secret, and would be found inside ordinary words."""

_NAME = (
    r"(?:[a-z0-9]+[-_])*(?:password|passwd|passphrase|secret|credentials?|(?:api|(?:shared)?access|account|secret|private)[-_]?key"
    r"(?:[-_]id)?"
    r"|(?:auth|access|api|hf|hub|session|security|bearer|refresh|id|github|gh)[-_]?token)"
)
_VARIABLE = re.compile(rf"{_NAME}|(?:[a-z0-9]+_)+(?:token|pat)", re.IGNORECASE)
_WORD = re.compile(rf"(?:{_NAME}|token)", re.IGNORECASE)
_QUOTED = r"(?P<quote>\\?['\"])(?:(?!(?P=quote))(?:[^\\\n]|\\.))+(?P=quote)"
_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/?#'\"<>]+@", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<name>[?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|awsaccesskeyid|sig|se?key|key"
    rf"|token|{_NAME})=)[^&#\s'\"<>]+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    rf"(?P<name>(?<![\w?&;-])(?:[\w.-]+\.)?(?:--?)?(?:{_NAME}|token)\\?['\"]?\s?(?:=|:)\s?)(?!//)"
    rf"(?:{_QUOTED}|(?P<open>\\?['\"]?)[^\s'\",}}\]]+)",
    re.IGNORECASE,
)
_OPTION = re.compile(rf"(?P<name>(?<!\S)--?(?:{_NAME}|token)\s+)(?!-)(?:{_QUOTED}|\S+)", re.IGNORECASE)
_HEADER = re.compile(
    r"(?P<name>\bauthorization\\?['\"]?\s?[:=]\s?\\?['\"]?)"
    r"(?:(?P<method>(?:bearer|basic|token|digest|negotiate|apikey)\s+)[^\s'\"\\,}\]]+|[^'\"\\\n]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<name>\bbearer\s+)[a-z0-9._~+/=-]{8,}", re.IGNORECASE)
_LOGIN = re.compile(
    rf"(?P<name>(?<!\S)(?:-u\s*|--(?:proxy-)?user[=\s]\s*))(?!['\"]?\d+:\d+\b)"
    rf"(?:(?=['\"][^'\":]+:){_QUOTED}|[^\s:'\"/]+:(?!//)[^\s'\"]+)"
)
"""As curl takes it. Two numbers are ids of a user and a group."""
_SHAPED = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,})\b")


def redact(text: str) -> str:
    """``text`` with a mask in the place of each secret."""
    for value in _values_of_variables():
        text = text.replace(value, MASK)
    text = _USER.sub(rf"\g<scheme>{MASK}@", text)
    for pattern in (_QUERY, _HEADER, _ASSIGNED, _OPTION, _BEARER, _LOGIN):
        text = pattern.sub(_masked, text)
    return _SHAPED.sub(MASK, text)


def _masked(found: re.Match[str]) -> str:
    groups = {name: text or "" for name, text in found.groupdict().items()}
    before = groups["name"] + groups.get("method", "") + groups.get("open", "")
    return f"{before}{groups.get('quote', '')}{MASK}{groups.get('quote', '')}"


def redact_all(item: Any) -> Any:
    """A copy of nested mappings and lists, with every text in it redacted, and what stands under a secret's name."""
    if isinstance(item, str):
        return redact(item)
    if isinstance(item, Mapping):
        return {
            key: MASK if _can_be_secret(value) and _WORD.fullmatch(str(key)) else redact_all(value)
            for key, value in item.items()
        }
    if isinstance(item, (list, tuple)):
        return [redact_all(value) for value in item]
    return item


def _can_be_secret(value: Any) -> bool:
    return not isinstance(value, bool) and value not in (None, "", [], {}, ())


def redact_words(words: Sequence[str]) -> list[str]:
    """A command line; the word after an option such as --hf-token is a secret."""
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        hidden = before.startswith("-") and _WORD.fullmatch(before.lstrip("-")) and not word.startswith("-")
        shown.append(MASK if hidden else redact(word))
    return shown


def _values_of_variables() -> list[str]:
    """As they are and as an address has them; the longest first: one may be part of another."""
    values = {
        value.strip()
        for name, value in os.environ.items()
        if _VARIABLE.fullmatch(name) and len(value.strip()) >= MIN_CHARACTERS
    }
    encoded = {form for value in values for form in (quote(value), quote(value, safe=""), quote_plus(value))}
    encoded |= {re.sub(r"%[0-9A-F]{2}", lambda found: found[0].lower(), form) for form in encoded}
    return sorted(values | encoded, key=len, reverse=True)
