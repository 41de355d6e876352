"""A cache opened for a run: whether it is of this teacher, task and data, whole, and enough for the run's terms."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from transformers import PreTrainedConfig

from engine.cache.codec import describe_codec
from engine.cache.fitness import check_terms, num_rounds, task_settings
from engine.cache.folder import HEAD, RANKS, CacheFolder, cache_address, head_content, ranks_of
from engine.cache.identity import CacheIdentity
from engine.config.cache import HiddenSection
from engine.config.run import RunConfig
from engine.data.manifest import Manifest
from engine.data.record import encode_array
from engine.data.shards import ShardSet
from engine.errors import CacheError, ConfigError
from engine.schema import Head
from engine.teacher.fingerprint import fingerprint_teacher

_SHOWN = 8


def open_cache(config: RunConfig, data: Manifest, teacher: str | None) -> CacheFolder:
    """The cache of ``config``. ``teacher`` is the fingerprint of teacher.model, where one is given.

    Raises CacheError, naming both sides, when the cache is of another teacher, tokenizer or task, cannot serve a term,
    or lacks shards that nobody is there to be asked about.
    """
    assert config.teacher.cache is not None
    folder = CacheFolder.open(cache_address(config.teacher.cache, config.data.manifest))
    identity = folder.identity
    wanted = replace(
        identity,
        teacher=teacher or identity.teacher,
        teacher_name=str(config.teacher.model),
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        task=task_settings(config.task),
        num_rounds=num_rounds(config.task),
    )
    if different := identity.differences(wanted, ("the cache has", "the run has")):
        raise CacheError(
            f"{folder.address} was made for something else:\n  " + "\n  ".join(different) + "\nPoint teacher.cache at "
            "the cache of this teacher and task, or make it with launch/cache_teacher.py"
        )
    check_terms(config, identity)
    folder.check_data(data)
    if config.teacher.on_missing == "refuse":
        _refuse_missing(folder, data)
    return folder


def join_cache(config: RunConfig, shards: ShardSet, head: Head, precision: str) -> CacheFolder:
    """The cache that this run's teacher fills, made unless it is there.

    Raises CacheError when it cannot be written, or holds what another teacher or other settings gave.
    """
    assert config.teacher.cache is not None
    files = {RANKS: encode_array(ranks_of(shards))}
    if config.cache.codec.kind == "hidden":
        files[HEAD] = head_content(head)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    identity = CacheIdentity(
        codec=describe_codec(config.cache.codec),
        temperature=config.cache.temperature,
        teacher=fingerprint_teacher(config.teacher),
        teacher_name=str(config.teacher.model),
        teacher_precision=precision,
        tokenizer=shards.manifest.tokenizer,
        vocab_size=shards.manifest.vocab_size,
        task=task_settings(config.task),
        num_rounds=num_rounds(config.task),
        seed=config.cache.seed,
        micro_sequences=config.cache.micro_sequences,
        ranks_sha256=hashes[RANKS],
        head_sha256=hashes.get(HEAD),
    )
    address = cache_address(config.teacher.cache, config.data.manifest)
    return CacheFolder.create_or_join(address, identity, files)


def _refuse_missing(folder: CacheFolder, data: Manifest) -> None:
    missing = folder.missing(data)
    if not missing:
        return
    names = ", ".join(entry.name for entry in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    at_work = folder.claims()
    advice = (
        f"it is still being written: {'; '.join(at_work[:_SHOWN])}. Wait until it is complete"
        if at_work
        else "run launch/cache_teacher.py again, which makes only these, or set teacher.on_missing: ask"
    )
    raise CacheError(
        f"{folder.address} has no targets for {len(missing)} of {len(data.shards)} shards: {names}{more}; {advice}"
    )


def check_layers(config: RunConfig, head: Head, teacher: PreTrainedConfig) -> None:
    """Raises ConfigError for layers that the teacher does not have, or that a row of a record has no room for."""
    layers = config.cache.codec.layers if isinstance(config.cache.codec, HiddenSection) else ()
    if max(layers, default=0) > teacher.num_hidden_layers:
        raise ConfigError(
            f"cache.codec.layers: there is no layer {max(layers)}; the teacher has {teacher.num_hidden_layers}, and 0 "
            "is its embeddings"
        )
    if layers and head.weight.shape[1] != teacher.hidden_size:
        raise ConfigError(
            f"cache.codec.layers: the teacher's layers are {teacher.hidden_size} wide, the states before its head "
            f"{head.weight.shape[1]}, and a record has one width; leave cache.codec.layers empty"
        )
