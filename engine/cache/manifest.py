"""manifest.json of a cache: all sidecars with their sizes, hashes and headers, written when the last one is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.cache.identity import FORMAT_VERSION, CacheIdentity
from engine.cache.sidecar import REMEDY, SidecarHeader
from engine.data.manifest import ShardEntry
from engine.errors import CacheError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SidecarEntry:
    """A line of the cache's manifest."""

    name: str
    num_bytes: int
    sha256: str
    header: dict[str, Any]


def parse_manifest(content: bytes, address: str, identity: CacheIdentity) -> dict[str, SidecarEntry]:
    """The sidecars by name. Raises CacheError when the file is damaged, or of another cache."""
    try:
        found = json.loads(content)
        entries = [SidecarEntry(**entry) for entry in found["sidecars"]]
        if found["cache"] != identity.sha256:
            raise CacheError(f"{address}: belongs to another cache than the cache.json beside it; {REMEDY}")
    except (ValueError, KeyError, TypeError) as problem:
        raise CacheError(f"{address}: damaged ({problem!r}); {REMEDY}") from problem
    return {entry.name: entry for entry in entries}


def manifest_content(entries: Sequence[SidecarEntry], identity: CacheIdentity) -> bytes:
    content = {
        "format_version": FORMAT_VERSION,
        "cache": identity.sha256,
        "num_bytes": sum(entry.num_bytes for entry in entries),
        "sidecars": [asdict(entry) for entry in entries],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def check_header(header: SidecarHeader, entry: ShardEntry, identity: CacheIdentity, address: str) -> None:
    """Raises CacheError, naming both sides, for the sidecar of another cache, shard or version of the data."""
    sides = (
        ("is of another cache: of the one with the hash", header.cache, identity.sha256),
        ("was made for the shard", header.shard, entry.name),
        (f"was made for other data: {entry.name} had sha256", header.shard_sha256, entry.sha256),
        ("has samples", header.num_samples, entry.num_samples),
        ("has rounds", header.num_rounds, identity.num_rounds),
    )
    for what, found, expected in sides:
        if found != expected:
            raise CacheError(
                f"{address}: {what} {found}, expected {expected}; make a cache for this data with "
                "launch/cache_teacher.py, or point data.manifest and teacher.cache at those that belong together"
            )


def facts_of(identity: CacheIdentity, entries: Mapping[str, SidecarEntry], num_bytes: int) -> dict[str, str]:
    """For people: what the cache is, and what all its sidecars hold when it is complete."""
    codec = {key: value for key, value in identity.codec.items() if key not in ("kind", "version")}
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in codec.items())
    facts = {"codec": f"{identity.codec['kind']}: {settings}", "of": identity.teacher_name}
    headers = [entry.header for entry in entries.values()]
    total = {name: sum(header[name] for header in headers) for name in ("num_positions", "num_pairs")}
    if total["num_positions"]:
        positions = total["num_positions"]
        facts["size"] = f"{num_bytes / 1e6:,.1f} MB, {num_bytes / positions:.1f} bytes a position"
        facts["positions"] = f"{positions:,} in {len(headers):,} shards"
    if total["num_pairs"]:
        kept = sum(header["kept_mass"] for header in headers) / total["num_positions"]
        facts["kept"] = f"{total['num_pairs'] / total['num_positions']:.1f} ids a position, {kept:.1%} of the mass"
    return facts
