"""The same samples, under the same keys and in the same order, in shards of another size.

python data_tools/reshard.py shards/manifest.json --output resharded --shard-bytes 512MB
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_tools.shard_folder import ShardFolder
from data_tools.sizes import byte_count
from engine.data.manifest import Manifest
from engine.data.shards import ShardSet
from engine.errors import ConfigError, DataError
from engine.log import Progress, run_main
from engine.schema import Sample

_SHOW_EVERY = 256


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The same samples in shards of another size.")
    parser.add_argument("manifest", help="path or address of manifest.json")
    parser.add_argument("--output", required=True, type=Path, help="folder for the new shards")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--shard-bytes", type=byte_count, help="size of a shard, as in 256MB or 1GiB")
    size.add_argument("--num-shards", type=int, help="number of shards, of equally many samples")
    parser.add_argument("--overwrite", action="store_true", help="delete the shards that OUTPUT holds, and start anew")
    parser.add_argument("--allow-pipe", action="store_true", help="run the pipe: commands that the manifest names")
    options = parser.parse_args(argv)
    try:
        return reshard(options)
    except OSError as problem:
        raise DataError(f"{problem}; run the same command again to go on after the last finished shard") from problem


def reshard(options: argparse.Namespace) -> int:
    """Copy the samples. Raises DataError for damage in the source, ConfigError for settings that cannot be."""
    shards = ShardSet.open(options.manifest, allow_pipe=options.allow_pipe)
    source = shards.manifest
    if Path(options.manifest).exists() and options.output.resolve() == Path(options.manifest).resolve().parent:
        raise ConfigError(f"--output {options.output} is the folder of the source; give another")
    if options.num_shards is not None and not 1 <= options.num_shards <= source.num_samples:
        raise ConfigError(
            f"--num-shards {options.num_shards}: expected 1 to {source.num_samples}, the samples there are"
        )
    wanted = replace(source, shards=(), token_counts_sha256="", num_documents=0, command=_command(source, options))
    fingerprint = hashlib.sha256(source.to_json().encode()).hexdigest()
    with ShardFolder(options.output, wanted, fingerprint, overwrite=options.overwrite) as folder:
        if folder.manifest is not None:
            print(f"{options.output}: complete already, nothing to do (--overwrite makes it anew)")
            return 0
        start = folder.position[0] if folder.position else 0
        with Progress(total=source.num_samples, label="samples", first_step=start) as progress:
            for done, sample in enumerate(_samples(shards, start), start + 1):
                folder.add(sample.token_ids, sample.document_tokens, sample.key, sample.annotation)
                if _is_full(folder, done, source.num_samples, options):
                    folder.cut([done])
                if done % _SHOW_EVERY == 0:
                    progress.update(done)
        folder.cut([source.num_samples])
        made = folder.finish(source.num_documents)
    print(f"{options.output}: {made.num_samples:,} samples in {len(made.shards)} shards, before {len(source.shards)}")
    return 0


def _samples(shards: ShardSet, start: int) -> Iterator[Sample]:
    """All samples in order, from number ``start`` of them."""
    for shard, num_samples in enumerate(shards.manifest.samples_per_shard):
        for index in range(min(start, num_samples), num_samples):
            yield shards.read(shard, index)
        start = max(0, start - num_samples)


def _is_full(folder: ShardFolder, done: int, total: int, options: argparse.Namespace) -> bool:
    if options.shard_bytes is not None:
        return bool(folder.shard_bytes >= options.shard_bytes)
    return bool(done * options.num_shards // total > (done - 1) * options.num_shards // total)


def _command(source: Manifest, options: argparse.Namespace) -> str:
    """Both commands, the source's first."""
    size = f"--shard-bytes {options.shard_bytes}" if options.shard_bytes else f"--num-shards {options.num_shards}"
    return f"{source.command} && python data_tools/reshard.py {size}"


if __name__ == "__main__":
    run_main(main)
