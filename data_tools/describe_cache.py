"""Tell what a cache of a teacher's targets holds: its settings, where its bytes go, what was kept of the teacher.

    python data_tools/describe_cache.py CACHE [--manifest data/manifest.json] [--tokenizer FOLDER] [--positions 3]

CACHE is the folder or the address of a cache. With the manifest of its data a few positions are shown as text.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from data_tools.cache_bytes import SidecarFacts, split_bytes, survey_stride
from data_tools.cache_records import RecordReader
from data_tools.cached_positions import PositionViewer
from data_tools.sizes import show_bytes
from engine.cache.codec import read_codec
from engine.cache.folder import SUFFIX, CacheFolder
from engine.cache.identity import IDENTITY
from engine.cache.manifest import MANIFEST
from engine.config.cache import HiddenSection
from engine.data.address import beside, is_remote
from engine.data.atomic import files_below
from engine.data.shards import ShardSet
from engine.errors import CacheError
from engine.log import run_main

COLUMNS = 80


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tell what a cache of a teacher's targets holds.")
    parser.add_argument("cache", help="folder or address of the cache")
    parser.add_argument("--manifest", help="manifest.json of its data; shows a few positions as text")
    parser.add_argument("--tokenizer", help="folder or hub id (default: where the teacher was loaded from)")
    parser.add_argument("--positions", type=int, default=3, help="how many positions to show")
    parser.add_argument("--allow-pipe", action="store_true", help="run the pipe: commands that the manifest names")
    options = parser.parse_args(argv)
    folder = CacheFolder.open(f"{options.cache.removesuffix(IDENTITY).rstrip('/')}/{IDENTITY}")
    reader = RecordReader(folder)
    sidecars = [_facts(folder, name) for name in _names(folder)]
    print("\n".join(_rows(_settings(folder, sidecars))))
    if sum(sidecar.header.num_positions for sidecar in sidecars):
        print("\n" + "\n".join(_bytes(split_bytes(folder, sidecars, reader), sidecars)))
        print("\n" + "\n".join(_rows(_teacher(folder, sidecars))))
    if options.manifest:
        shards = ShardSet.open(options.manifest, allow_pipe=options.allow_pipe)
        viewer = PositionViewer(folder, reader, shards, options.tokenizer)
        for lines in viewer.spread(options.positions):
            print("\n" + "\n".join(lines))
    return 0


def _names(folder: CacheFolder) -> list[str]:
    """Of the sidecars that are there."""
    entries = folder.manifest()
    if entries is not None:
        return list(entries)
    if is_remote(folder.address):
        raise CacheError(f"{beside(folder.address, MANIFEST)}: missing; copy the cache there when it is complete")
    return sorted(str(path.relative_to(folder.path)) for path in files_below(folder.path, SUFFIX))


def _facts(folder: CacheFolder, name: str) -> SidecarFacts:
    sidecar = folder.sidecar_called(name)
    return SidecarFacts(name, sidecar.num_bytes, sidecar.header)


def _settings(folder: CacheFolder, sidecars: Sequence[SidecarFacts]) -> dict[str, str]:
    identity, headers = folder.identity, [sidecar.header for sidecar in sidecars]
    complete = "" if folder.manifest() is not None else ", not complete: more are to be made"
    num_bytes = sum(sidecar.num_bytes for sidecar in sidecars)
    rows = {
        "cache": folder.address,
        "codec": _listed(identity.codec, "kind"),
        "temperature": f"{identity.temperature:g}",
        "teacher": f"{identity.teacher_name} in {identity.teacher_precision}",
        "fingerprint": identity.teacher[:32],
        "asked in": f"batches of {identity.micro_sequences} sequences, draws by seed {identity.seed}",
        "task": _listed(identity.task, "kind"),
        "rounds": f"{identity.num_rounds} of each sample",
        "tokenizer": f"fingerprint {identity.tokenizer[:16]}, {identity.vocab_size:,} ids",
        "shards": f"{len(sidecars):,}, {show_bytes(num_bytes)} in all{complete}",
        "samples": f"{sum(h.num_samples for h in headers):,}, which have {sum(h.num_tokens for h in headers):,} tokens",
        "positions": f"{sum(h.num_positions for h in headers):,} with targets",
    }
    if identity.num_rounds == 1:
        del rows["rounds"]
    return rows


def _bytes(split: Mapping[str, int], sidecars: Sequence[SidecarFacts]) -> Iterator[str]:
    num_positions = sum(sidecar.header.num_positions for sidecar in sidecars)
    total = sum(split.values())
    yield f"{'where the bytes go':<32}{'bytes':>19}{'a position':>16}{'share':>9}"
    for name, num_bytes in [*split.items(), ("all in", total)]:
        yield f"  {name:<30}{num_bytes:>19,}{num_bytes / num_positions:>16,.3f}{num_bytes / total:>9.1%}"
    if (stride := survey_stride(sidecars)) > 1:
        yield f"  the parts of records are estimated from one record in {stride:,}"


def _teacher(folder: CacheFolder, sidecars: Sequence[SidecarFacts]) -> dict[str, str]:
    """Means over all positions, by the headers."""
    section = read_codec(folder.identity.codec)
    headers = [sidecar.header for sidecar in sidecars]
    num_positions = sum(header.num_positions for header in headers)
    if isinstance(section, HiddenSection):
        return {"kept": f"states whole, as {section.dtype}: entropy and perplexity are not known without the head"}
    mass, ids, nll, entropy = (
        sum(getattr(header, name) for header in headers) / num_positions
        for name in ("kept_mass", "num_pairs", "nll", "entropy")
    )
    at = f" at temperature {folder.identity.temperature:g}" if folder.identity.temperature != 1.0 else ""
    return {
        "kept": f"{ids:.2f} ids a position, which have {mass:.1%} of the teacher's probability{at}",
        "entropy": f"{entropy:.3f} nats{at}: as much as {math.exp(entropy):,.1f} ids that are equally likely",
        "perplexity": f"{_exp(nll)}, the teacher's of the labels",
    }


def _exp(nll: float) -> str:
    return f"{math.exp(nll):,.2f}" if nll < 700 else f"e^{nll:,.0f}"


def _listed(settings: Mapping[str, object], first: str) -> str:
    return ", ".join([str(settings[first]), *(f"{key} {value}" for key, value in settings.items() if key != first)])


def _rows(rows: Mapping[str, str]) -> list[str]:
    lines = []
    for name, value in rows.items():
        lines += textwrap.wrap(f"{name:<11} {value}", COLUMNS, subsequent_indent=" " * 12)
    return lines


if __name__ == "__main__":
    run_main(main)
