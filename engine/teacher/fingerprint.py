"""What tells one teacher from another: a hash of its weights and its config, whatever its folder is called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils.hub import cached_file

from engine.config.run import ModelSection
from engine.errors import ConfigError
from engine.models import PICKLE_SUFFIXES

_BLOCK_BYTES = 8 << 20
_NOT_THE_MODEL = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
)
"""Settings that come and go with saving, and change nothing that the model computes."""


def fingerprint_teacher(section: ModelSection) -> str:
    """sha256 over the tensors as they lie in the weight files and the config; nothing is loaded.

    Cutting the same tensors into other files changes nothing. A pickle is hashed as a whole. Raises ConfigError when
    the model's files are not found.
    """
    config = _file(section, "config.json")
    if config is None:
        raise ConfigError(f"teacher.model: no model at {section.model!r}; give a folder or the id of a model")
    parts = [f"config {_config_text(config)}"]
    files = _safetensors(section)
    if files:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter
            tensors = [(path, *tensor) for path in files for tensor in _tensors(path)]
            digests = pool.map(lambda tensor: _digest(tensor[0], *tensor[2:]), tensors)
            parts += sorted(f"{name} {digest}" for (_, name, *_), digest in zip(tensors, digests))
    else:
        pickles = sorted(path for path in config.parent.iterdir() if path.suffix in PICKLE_SUFFIXES)
        parts += [f"{path.name} {_digest(path, 0, path.stat().st_size)}" for path in pickles]
    if len(parts) == 1:
        raise ConfigError(f"teacher.model: {section.model!r} has no weight files; give a folder that holds them")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _file(section: ModelSection, name: str) -> Path | None:
    """A file of the model, fetched if need be; None when the model has none of that name."""
    assert section.model is not None
    try:
        found = cached_file(section.model, name, revision=section.revision)
    except OSError:
        return None
    return None if found is None else Path(found)


def _safetensors(section: ModelSection) -> list[Path]:
    """The files that transformers reads: a folder may also hold the same weights in another cut."""
    if (whole := _file(section, "model.safetensors")) is not None:
        return [whole]
    if (index := _file(section, "model.safetensors.index.json")) is None:
        return []
    files = []
    for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        if (path := _file(section, name)) is None:
            raise ConfigError(f"teacher.model: {index} names {name}, which is not there; copy the model again")
        files.append(path)
    return files


def _config_text(path: Path) -> str:
    config = json.loads(path.read_text())
    return json.dumps({key: value for key, value in config.items() if key not in _NOT_THE_MODEL}, sort_keys=True)


def _tensors(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name with dtype and shape, first byte, end) of each tensor of a safetensors file."""
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > path.stat().st_size:
            raise ConfigError(f"{path}: not a safetensors file, or cut short; copy the model again")
        header = json.loads(stream.read(header_bytes))
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = (8 + header_bytes + offset for offset in tensor["data_offsets"])
            yield f"{name} {tensor['dtype']} {tensor['shape']}", start, end


def _digest(path: Path, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        while start < end:
            block = stream.read(min(_BLOCK_BYTES, end - start))
            if not block:
                raise ConfigError(f"{path}: cut short; copy the model again")
            digest.update(block)
            start += len(block)
    return digest.hexdigest()
