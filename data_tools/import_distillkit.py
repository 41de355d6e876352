"""The captures of arcee-ai/DistillKit to shards with a cache of targets beside them.

    python data_tools/import_distillkit.py --input captured --compression captured/compression_config.yaml \\
        --tokenizer Qwen/Qwen3-8B --output shards

A run with ``data: {manifest: shards/manifest.json}`` and ``teacher: {kind: cached, cache: distillkit}`` trains from it.
Killed and started again, it goes on after the last finished shard. docs/data.md describes what becomes of what.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from data_tools.distillkit_cache import CacheImport
from data_tools.distillkit_config import DistillKitConfig
from data_tools.distillkit_identity import identify_teacher
from data_tools.distillkit_rows import find_files
from data_tools.distillkit_shards import longest_row, write_shards
from data_tools.shard_folder import ShardFolder
from data_tools.sizes import show_bytes
from engine.cache.folder import cache_address
from engine.config.cache import TopKSection
from engine.data.manifest import MANIFEST, Manifest
from engine.errors import ConfigError, DataError
from engine.log import run_main
from engine.redaction import redact_words
from engine.tasks.tokenizer import fingerprint, load_tokenizer, vocab_size

log = logging.getLogger("stillhouse")

_SUSPICIOUS = 0.01
"""Share of positions with probabilities above 1 in all that is worth a word."""


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    try:
        return import_capture(options)
    except OSError as problem:
        raise DataError(f"{problem}; run the same command again to go on after the last finished shard") from problem


def import_capture(options: argparse.Namespace) -> int:
    """Shards first: the codes of the cache depend on how often each id occurs in all of them.

    Raises ConfigError, DataError and CacheError.
    """
    config, files = _settings(options.compression), find_files(options.input)
    wanted, manifest_path = _wanted(options, files), options.output / MANIFEST
    source = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    with ShardFolder(options.output, wanted, source, overwrite=options.overwrite) as folder:  # holds a lock to the end
        address = Path(cache_address(options.cache, str(manifest_path)))
        if options.overwrite and address.exists():
            shutil.rmtree(address.parent)
        if folder.manifest is None:
            write_shards(folder, wanted, files, shard_samples=options.shard_samples, cut=options.cut)
        elif max(time for _, _, time in source) > manifest_path.stat().st_mtime_ns:
            raise DataError(f"{options.input} changed after {manifest_path} was made from it; --overwrite starts anew")
        section = TopKSection(kind="top_k", k=config.k, max_error=options.max_error)
        teacher = identify_teacher(options.teacher, options.input, config, files)
        cache = CacheImport(manifest_path, options.cache, config, section, teacher)
        if cache.is_complete:
            print(f"{cache.folder.path}: complete already, nothing to do (--overwrite makes it anew)")
            return 0
        cache.fill(files, options.workers)
        assert folder.manifest is not None
        _print_summary(folder.manifest, cache, options)
    return 0


def _settings(path: Path) -> DistillKitConfig:
    try:
        return DistillKitConfig.parse(yaml.safe_load(path.read_text()), str(path))
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise ConfigError(f"--compression {path}: cannot be read ({problem}); give the capture's own file") from problem


def _wanted(options: argparse.Namespace, files: Sequence[Path]) -> Manifest:
    tokenizer = load_tokenizer(options.tokenizer)
    return Manifest(
        task="causal_lm",
        tokenizer=fingerprint(tokenizer),
        vocab_size=vocab_size(tokenizer),
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        sequence_tokens=options.sequence_tokens or longest_row(files),
        num_documents=0,
        shards=(),
        token_counts_sha256="",
        command=_command(options),
    )


def _command(options: argparse.Namespace) -> str:
    """What decides the shards, so that caches with other settings may lie beside the same ones."""
    words = ["python", "data_tools/import_distillkit.py", "--input", str(options.input)]
    words += ["--tokenizer", options.tokenizer, "--shard-samples", str(options.shard_samples)]
    words += ["--sequence-tokens", str(options.sequence_tokens)] if options.sequence_tokens else []
    return shlex.join(redact_words([*words, *(["--cut"] if options.cut else [])]))


def _print_summary(data: Manifest, cache: CacheImport, options: argparse.Namespace) -> None:
    print(
        f"{options.output}: {data.num_documents:,} documents, {data.num_tokens:,} tokens, {data.num_samples:,} "
        f"sequences, {len(data.shards)} shards"
    )
    made = cache.folder.manifest() or {}
    positions, mass = (sum(entry.header[name] for entry in made.values()) for name in ("num_positions", "kept_mass"))
    print(
        f"{cache.folder.path}: {positions:,} positions, {show_bytes(cache.folder.num_bytes())}; the kept ids hold "
        f"{mass / max(1, positions):.1%} of the teacher's mass"
    )
    share = cache.num_above / max(1, cache.num_positions)
    if share > _SUSPICIOUS:
        log.warning(
            "at %.1f%% of the positions the probabilities were more than 1 in all, and were scaled down to 1: the "
            "capture's curves are far off there, or %s is not its own",
            100 * share,
            options.compression,
        )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--input", required=True, type=Path, help="parquet file, or a folder of them")
    parser.add_argument("--compression", required=True, type=Path, help="the capture's compression_config.yaml")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder for the shards and the cache")
    parser.add_argument("--cache", type=_name, default="distillkit", help="name of the cache (default distillkit)")
    parser.add_argument(
        "--teacher", help="folder or hub id of the captured model, to be told from others by its weights"
    )
    parser.add_argument("--max-error", type=_error, default=0.05, help="of a log-probability, nats (default 0.05)")
    parser.add_argument("--sequence-tokens", type=_count, help="longest sequence (default: the longest row)")
    parser.add_argument("--cut", action="store_true", help="cut longer rows into several samples")
    parser.add_argument("--shard-samples", type=_count, default=4096, help="samples of a shard (default 4096)")
    parser.add_argument("--workers", type=_count, default=len(os.sched_getaffinity(0)), help="encoding processes")
    parser.add_argument("--overwrite", action="store_true", help="delete the shards and the cache, and start anew")
    return parser.parse_args(argv)


def _name(text: str) -> str:
    if not text.strip(".") or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: expected that of a folder beside the shards")
    return text


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return int(text)


def _error(text: str) -> float:
    if not 0.001 <= float(text) <= 0.5:
        raise argparse.ArgumentTypeError(f"{text}: expected 0.001 to 0.5")
    return float(text)


if __name__ == "__main__":
    run_main(main)
