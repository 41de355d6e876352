"""Whether a cache can give what a run asks of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from engine.cache.codec import read_codec
from engine.cache.identity import CacheIdentity
from engine.config.cache import HiddenSection, SampledSection
from engine.config.run import RunConfig, TaskSection
from engine.config.terms import AnyTerm, AttentionTerm, HiddenTerm, LogitTerm, Ramp, RelationTerm
from engine.errors import CacheError

log = logging.getLogger("stillhouse")


def task_settings(section: TaskSection) -> dict[str, Any]:
    """What inputs and labels depend on besides the data."""
    settings: dict[str, Any] = {"kind": section.kind}
    if section.kind == "masked_lm":
        settings |= {key: value for key, value in section.model_dump(mode="json").items() if key.startswith("mask_")}
    return settings


def num_rounds(section: TaskSection) -> int:
    """Different inputs that a sample has."""
    return section.mask_rounds if section.kind == "masked_lm" else 1


def check_terms(config: RunConfig, identity: CacheIdentity) -> None:
    """Raises CacheError for every term that the cache cannot serve exactly, and warns of what it approximates."""
    problems = [
        f"losses.{i} ({term.kind}): {problem}"
        for i, term in enumerate(config.losses)
        for problem in _problems(term, identity, config.teacher.tail)
    ]
    if problems:
        raise CacheError(
            f"the cache {config.teacher.cache} (codec {identity.codec['kind']}, temperature {identity.temperature:g}) "
            "cannot serve:\n  " + "\n  ".join(problems)
        )


def _problems(term: AnyTerm, identity: CacheIdentity, tail: str) -> Sequence[str]:
    codec = read_codec(identity.codec)
    if isinstance(term, HiddenTerm):
        if isinstance(codec, HiddenSection):
            return _hidden_problems(term, codec)
        return ["it needs hidden states; make a cache with codec hidden and its layers, or ask a teacher online"]
    if isinstance(term, AttentionTerm | RelationTerm):
        return ["a cache keeps no attention; ask a teacher online"]
    if not isinstance(term, LogitTerm):
        return []
    found = []
    if term.restrict_to == "all":
        found.append("restrict_to: all needs every token, and a cache keeps the positions with a label")
    if isinstance(codec, HiddenSection):
        return found
    if term.kind != "forward_kl" and (
        isinstance(codec, SampledSection) or tail != "bucket" or term.kind == "logits_mse"
    ):
        exact = "forward_kl alone" if isinstance(codec, SampledSection) or tail != "bucket" else "all but logits_mse"
        found.append(f"{codec.kind}{'' if isinstance(codec, SampledSection) else f' with tail: {tail}'} serves {exact}")
    if isinstance(term.temperature, Ramp) or term.temperature != identity.temperature:
        if isinstance(codec, SampledSection):
            found.append(
                f"its temperature must be the cache's, {identity.temperature:g}: draws at one temperature say nothing "
                "of another"
            )
        elif not found:
            log.warning(
                "losses: %s at another temperature than the cache's %g is approximated: the kept ids are exact, the "
                "tail's mass is taken as spread evenly over all other ids",
                term.kind,
                identity.temperature,
            )
    return found


def _hidden_problems(term: HiddenTerm, codec: HiddenSection) -> Sequence[str]:
    if not codec.layers:
        return ["the cache keeps the states before the head alone; make it with cache.codec.layers"]
    if isinstance(term.layers, str):
        return ["name the layers as pairs [student, teacher]: with no teacher its depth is not known"]
    lacking = sorted({teacher for _, teacher in term.layers} - set(codec.layers))
    return [f"the cache keeps teacher layers {list(codec.layers)}, not {lacking}"] if lacking else []
