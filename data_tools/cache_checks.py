"""What can be wrong with a cache as a whole: its own files, what it belongs to, what was left behind in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from data_tools.cache_records import RecordReader
from engine.cache.claims import Claims
from engine.cache.fitness import num_rounds, task_settings
from engine.cache.folder import (
    CLAIMS,
    SUFFIX,
    CacheFolder,
    cache_address,
    sidecar_name,
)
from engine.cache.manifest import MANIFEST, SidecarEntry
from engine.config.run import RunConfig
from engine.data.address import beside, is_remote
from engine.data.atomic import files_below
from engine.data.shards import ShardSet
from engine.errors import ConfigError, StillhouseError
from engine.parts import shared_tokenizer
from engine.tasks.task import build_task

AGAIN = "run launch/cache_teacher.py again: it makes only what is missing"


class CacheCheck:
    """A cache beside the data and the task that it should belong to.

    ``problems`` has a line for each problem of the cache as a whole. Raises CacheError when there is no cache.json to
    check anything by, ConfigError or DataError for what is wrong with the run or the data.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.teacher.cache is None:
            raise ConfigError("teacher.cache is not given; name the cache to check: a folder, or one beside the data")
        self.shards = ShardSet.open(config.data.manifest, allow_pipe=config.data.allow_pipe)
        manifest = self.shards.manifest
        self.folder = CacheFolder.open(cache_address(config.teacher.cache, config.data.manifest))
        self.task = build_task(config.task, shared_tokenizer(config), manifest, self.shards.token_counts())
        self.problems: list[str] = self._differences(config)
        self.is_of_task = not self.problems
        """so that what the run gives to its models can be compared with what the teacher saw"""
        self.reader = self._reader()
        self.entries: dict[str, SidecarEntry] | None = None
        """what manifest.json says of each sidecar, where it can be read"""
        self.problems += [*self._manifest_problems(), *self._left_behind()]

    def _differences(self, config: RunConfig) -> list[str]:
        identity, manifest = self.folder.identity, self.shards.manifest
        wanted = replace(
            identity,
            tokenizer=manifest.tokenizer,
            vocab_size=manifest.vocab_size,
            task=task_settings(config.task),
            num_rounds=num_rounds(config.task),
        )
        lines = identity.differences(wanted, ("the cache has", "the run"))
        return [f"{self.folder.address}: made for something else: {line}" for line in lines]

    def _reader(self) -> RecordReader | None:
        """None when a file is damaged without which no record can be decoded."""
        try:
            return RecordReader(self.folder)
        except StillhouseError as problem:
            self.problems.append(str(problem))
            return None

    def _manifest_problems(self) -> Iterator[str]:
        address = beside(self.folder.address, MANIFEST)
        names = [sidecar_name(entry.name) for entry in self.shards.manifest.shards]
        try:
            self.entries = self.folder.manifest()
            missing = self.folder.missing(self.shards.manifest)
        except StillhouseError as problem:
            yield str(problem)
            return
        if self.entries is None and not missing:
            yield f"{address}: missing, although no sidecar is; {AGAIN}"
        if self.entries is not None:
            for name in names:
                if name not in self.entries:
                    yield f"{address}: does not name {name}; delete it, and {AGAIN}"

    def _left_behind(self) -> Iterator[str]:
        """What a finished cache does not have: claims, files half written, sidecars of nothing."""
        if is_remote(self.folder.address):
            return
        folder = self.folder.path
        for claim in Claims(folder / CLAIMS).all():
            job = f"process {claim.owner.pid} on {claim.owner.host}"
            what = f"left by {job}, which is gone; {AGAIN}" if claim.is_stale else f"{job} is making it; wait for it"
            yield f"{folder / CLAIMS}: a claim on {claim.name}: {what}"
        for path in sorted(files_below(folder, ".partial")):
            yield f"{path}: half written; delete it, unless a job is at work on it"
        named = {sidecar_name(entry.name) for entry in self.shards.manifest.shards} | set(self.entries or ())
        for path in sorted(files_below(folder, SUFFIX)):
            if str(path.relative_to(folder)) not in named:
                yield f"{path}: of no shard of the data, and not named by {MANIFEST}; delete it, or copy the data again"
