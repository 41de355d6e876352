"""A cache as files, and who may read what of it.

``cache.json``       what all sidecars have in common (engine/cache/identity.py)
``ranks.npy``        [V] uint32: the number of each id by its frequency in the data, 0 for the most frequent
``head.safetensors`` weight [V, G] and bias of the teacher's head, its scale and softcap; where states are kept
``NAME.targets.tar`` the sidecar of data shard NAME.tar (engine/cache/sidecar.py)
``manifest.json``    all sidecars with their sizes and hashes; there when the cache is complete
``claims/``          which job makes which shard (engine/cache/claims.py); gone when the cache is complete
``journal/``         what runs asked live of shards that are not whole yet (engine/cache/journal.py)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from engine.cache.claims import Claims, waiting
from engine.cache.identity import IDENTITY, CacheIdentity
from engine.cache.manifest import MANIFEST, SidecarEntry, check_header, facts_of, manifest_content, parse_manifest
from engine.cache.sidecar import Sidecar, SidecarHeader
from engine.data.address import BLOCK_BYTES, ByteSource, LocalFile, OnceCache, RemoteFile, beside, is_remote, read_bytes
from engine.data.atomic import create_once, files_below, write_atomically
from engine.data.manifest import Manifest, ShardEntry
from engine.data.record import read_array
from engine.data.shards import ShardSet
from engine.errors import CacheError, ConfigError, MissingError
from engine.schema import Head

RANKS, HEAD, CLAIMS = "ranks.npy", "head.safetensors", "claims"
SUFFIX = ".targets.tar"
_REMOTE_BYTES = 512 << 20


def cache_address(name: str, data_manifest: str) -> str:
    """The address of cache.json of the cache called ``name``: a folder, or one beside the data's manifest.

    Raises ConfigError for the data's own folder.
    """
    if "/" not in name and name not in (".", ".."):
        return beside(data_manifest, f"{name}/{IDENTITY}")
    address = f"{name.rstrip('/')}/{IDENTITY}"
    both_local = not is_remote(address) and not is_remote(data_manifest)
    if both_local and Path(address).parent.resolve() == Path(data_manifest).parent.resolve():
        raise ConfigError(
            f"teacher.cache: {name} is the folder of the data, whose manifest.json a cache would replace; give a name, "
            "such as targets, or another folder"
        )
    return address


def sidecar_name(shard: str) -> str:
    """The sidecar's file name for the data shard called ``shard``."""
    plain = shard if not shard.startswith("pipe:") else f"pipe-{hashlib.sha256(shard.encode()).hexdigest()[:16]}"
    return plain.removesuffix(".tar") + SUFFIX


class CacheFolder:
    """One cache, at the address of its cache.json. Any thread may use it."""

    def __init__(self, address: str, identity: CacheIdentity, known: Mapping[str, bytes] | None = None) -> None:
        """``known`` are files that another rank has read and checked, by name."""
        self.address = address
        self.identity = identity
        self._known = dict(known or {})
        self._blocks: OnceCache[tuple[str, int], bytes] = OnceCache(_REMOTE_BYTES // BLOCK_BYTES)

    @staticmethod
    def open(address: str) -> CacheFolder:
        """Raises CacheError when there is no cache, or one of a newer format."""
        try:
            content = read_bytes(address)
        except MissingError as problem:
            raise CacheError(f"{address}: there is no cache; make it with launch/cache_teacher.py") from problem
        return CacheFolder(address, CacheIdentity.from_json(content, address))

    def pack(self) -> tuple[str, bytes, dict[str, bytes]]:
        """For ``CacheFolder.unpack`` on other ranks: what each needs of the small files."""
        return self.address, self.identity.to_json(), {RANKS: self._checked(RANKS, self.identity.ranks_sha256)}

    @staticmethod
    def unpack(address: str, identity: bytes, known: dict[str, bytes]) -> CacheFolder:
        """What was packed; touches no file."""
        return CacheFolder(address, CacheIdentity.from_json(identity, address), known)

    @staticmethod
    def create_or_join(address: str, identity: CacheIdentity, files: dict[str, bytes]) -> CacheFolder:
        """The cache in a local folder, made unless it is there. ``files`` are what the identity has hashes of.

        Raises CacheError, naming both sides, when one is there that holds something else.
        """
        if is_remote(address):
            raise CacheError(f"{address}: a cache is made in a folder; give a path, and copy the finished cache there")
        path = Path(address)
        if path.with_name(MANIFEST).exists() and not path.exists():
            raise CacheError(
                f"{path.with_name(MANIFEST)}: this folder holds something else, and a cache would replace its "
                "manifest; give another teacher.cache"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                create_once(path.parent / name, content)
            create_once(path, identity.to_json())
        except OSError as problem:
            raise unwritable(path.parent, problem) from problem
        folder = CacheFolder.open(address)
        if different := folder.identity.differences(identity, ("it has", "this job")):
            raise CacheError(
                f"{address}: this cache holds other targets; {'; '.join(different)}. Use another teacher.cache, or "
                "delete the folder"
            )
        for name, content in files.items():
            if (path.parent / name).read_bytes() != content:
                raise CacheError(f"{path.parent / name}: is left of another cache; delete it and run again")
        return folder

    @property
    def path(self) -> Path:
        """The folder, of a local cache."""
        return Path(self.address).parent

    def path_of(self, entry: ShardEntry) -> Path:
        """Where the sidecar of a data shard lies, or will lie."""
        return Path(beside(self.address, sidecar_name(entry.name)))

    def ranks(self) -> np.ndarray:
        """[V]. Raises CacheError when it is missing or damaged."""
        content = self._checked(RANKS, self.identity.ranks_sha256)
        return read_array(content)

    def head(self) -> Head:
        """The teacher's head, of a cache that keeps states. Raises CacheError when it is missing or damaged."""
        assert self.identity.head_sha256 is not None
        tensors = safetensors.torch.load(self._checked(HEAD, self.identity.head_sha256))
        softcap = tensors["softcap"].item()
        return Head(tensors["weight"], tensors.get("bias"), tensors["scale"].item(), softcap or None)

    def sidecar(self, entry: ShardEntry) -> Sidecar:
        """The sidecar of a data shard.

        Raises CacheError when it is missing or damaged, and naming both sides when it belongs to another cache, shard
        or version of the data.
        """
        sidecar = self.sidecar_called(sidecar_name(entry.name))
        check_header(sidecar.header, entry, self.identity, sidecar.address)
        return sidecar

    def check_data(self, data: Manifest) -> None:
        """Raises CacheError when the manifest of a complete cache tells of other shards than ``data`` has."""
        entries = self.manifest() or {}
        for shard in data.shards:
            if (known := entries.get(sidecar_name(shard.name))) is not None:
                address = beside(self.address, known.name)
                header = SidecarHeader.from_json(json.dumps(known.header).encode(), address)
                check_header(header, shard, self.identity, address)

    def sidecar_called(self, name: str) -> Sidecar:
        """The sidecar in the file ``name``, of whatever shard. Raises CacheError when it is missing or damaged."""
        return Sidecar(self._file(name), beside(self.address, name))

    def manifest(self) -> dict[str, SidecarEntry] | None:
        """The sidecars by name; None while the cache is not complete. Raises CacheError when it is damaged."""
        address = beside(self.address, MANIFEST)
        try:
            content = read_bytes(address)
        except MissingError:
            return None
        return parse_manifest(content, address, self.identity)

    def write_manifest(self, data: Manifest) -> None:
        """manifest.json, over the sidecars of all shards as they lie now."""
        before = self.manifest() or {}
        entries = []
        for shard in data.shards:
            sidecar = self.sidecar(shard)
            known = before.get(sidecar_name(shard.name))
            if known is not None and (known.num_bytes, known.header) == (sidecar.num_bytes, asdict(sidecar.header)):
                entries.append(known)  # the header has the hash of the index, and that the sums of all records
                continue
            entries.append(
                SidecarEntry(sidecar_name(shard.name), sidecar.num_bytes, sidecar.sha256(), asdict(sidecar.header))
            )
        if entries != list(before.values()):
            write_atomically(self.path / MANIFEST, manifest_content(entries, self.identity))
        shutil.rmtree(self.path / CLAIMS, ignore_errors=True)
        for left_over in files_below(self.path, ".partial"):  # of jobs that were killed: every sidecar is there
            if SUFFIX in left_over.name:
                left_over.unlink(missing_ok=True)

    def withdraw_manifest(self) -> None:
        """Of a cache that was complete and of which a sidecar was deleted."""
        (self.path / MANIFEST).unlink(missing_ok=True)

    def missing(self, data: Manifest) -> list[ShardEntry]:
        """The shards that have no sidecar. Raises CacheError for a remote cache without a manifest: who could tell?"""
        if not is_remote(self.address):  # one listing instead of a question for each of thousands of files
            there = {path.relative_to(self.path).as_posix() for path in files_below(self.path, SUFFIX)}
            return [entry for entry in data.shards if sidecar_name(entry.name) not in there]
        manifest = self.manifest()
        if manifest is None:
            raise CacheError(f"{beside(self.address, MANIFEST)}: missing; copy the cache there when it is complete")
        return [entry for entry in data.shards if sidecar_name(entry.name) not in manifest]

    def num_bytes(self) -> int:
        """All that the complete cache takes: sidecars, manifest and the rest."""
        manifest = self.manifest() or {}
        names = [IDENTITY, RANKS, MANIFEST] + ([HEAD] if self.identity.head_sha256 else [])
        others = sum(self._file(name).num_bytes for name in names)
        return others + sum(entry.num_bytes for entry in manifest.values())

    def facts(self) -> dict[str, str]:
        """For people: what the cache is, and what all its sidecars hold when it is complete."""
        entries = self.manifest() or {}
        return facts_of(self.identity, entries, self.num_bytes() if entries else 0)

    def claims(self) -> list[str]:
        """A line for each shard that a job is at work on."""
        if is_remote(self.address):
            return []
        return list(waiting([claim for claim in Claims(self.path / CLAIMS).all() if not claim.is_stale]))

    def _file(self, name: str) -> ByteSource:
        address = beside(self.address, name)
        return RemoteFile(address, self._blocks) if is_remote(address) else LocalFile(address)

    def _checked(self, name: str, sha256: str) -> bytes:
        if name in self._known:
            return self._known[name]
        address = beside(self.address, name)
        content = read_bytes(address, sha256)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CacheError(f"{address}: not the file that {IDENTITY} names (sha256 differs); copy the cache again")
        return content


def head_content(head: Head) -> bytes:
    """head.safetensors."""
    tensors = {"weight": head.weight, "scale": torch.tensor(head.scale, dtype=torch.float64)}
    tensors["softcap"] = torch.tensor(head.softcap or 0.0, dtype=torch.float64)
    if head.bias is not None:
        tensors["bias"] = head.bias
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unwritable(path: Path, problem: OSError) -> CacheError:
    """What to say when the disk refuses."""
    return CacheError(
        f"{path}: cannot be written ({problem.strerror or problem}). Whole sidecars stay, and nothing half is left: "
        "make room or give another teacher.cache, and run the same command again"
    )


def ranks_of(shards: ShardSet) -> np.ndarray:
    """[V] uint32: ids by their frequency in the data; of equals the lower id first."""
    counts = shards.token_counts()
    ranks = np.empty(len(counts), np.uint32)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts), dtype=np.uint32)
    return ranks
