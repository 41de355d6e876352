"""What a host says of itself, so that hosts can be compared: some kilobytes, found in milliseconds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.cache.folder import cache_address
from engine.config.run import RunConfig
from engine.data.address import PIPE, beside, is_remote, read_bytes
from engine.data.manifest import Manifest
from engine.errors import StillhouseError
from engine.runfolder import git, package_versions

ENGINE = Path(__file__).resolve().parents[1]
ABSENT = "not there"
UNSET = "not set"
SHARED = "shared"
VARIABLES_THAT_MUST_AGREE = ("DS_ACCELERATOR", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NET", "NCCL_IB_DISABLE")
"""Ranks that differ in one of these never find each other, or wait for ever in a collective."""
VARIABLES = (
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_EXTENSIONS_DIR",
)
"""May differ where hosts do; more often one of them did not travel."""
HUB_CREDENTIALS = ("HF_TOKEN",)
S3_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
"""Told as set or not set, never by their values."""

_BLOCK_BYTES = 16 << 10
_FILE_BLOCKS, _WEIGHT_BLOCKS, _MAX_FILES = 64, 3, 64
_SIGHT_PAUSES_SECONDS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""A network file system may show a new file late."""

Facts = dict[tuple[str, str], str]
"""(kind, name) -> value; the kinds are those of ``compare.RULES``."""


@dataclass(frozen=True)
class Question:
    """What rank 0 has put into the run's output folder and read from its own manifest, for all hosts to look for."""

    path: str
    token: str
    problem: str | None = None
    """why the file could not be written"""
    made_folders: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    """the first and the last one"""


@dataclass(frozen=True)
class HostFacts:
    """Of one host, told by its rank of local rank 0."""

    host: str
    rank: int
    facts: Facts


def ask(config: RunConfig) -> Question:
    """Rank 0's part: write a random token into ``run.output``. Never raises; ``withdraw`` takes the file away."""
    folder, token = Path(config.run.output), secrets.token_hex(16)
    path = folder / f".hosts-{token[:8]}"
    made: tuple[str, ...] = ()
    problem = None
    try:
        made = tuple(str(each) for each in (folder, *folder.parents) if not each.exists())
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(token)
    except OSError as error:
        problem = error.strerror or str(error)
    return Question(str(path), token, problem, made, _outer_shards(config))


def withdraw(question: Question) -> None:
    """Leave ``run.output`` as it was; a folder that is in use by now stays."""
    with contextlib.suppress(OSError):
        Path(question.path).unlink(missing_ok=True)
        for folder in question.made_folders:
            os.rmdir(folder)


def describe(config: RunConfig, question: Question, rank: int, device: torch.device) -> HostFacts:
    """This host. Never raises, since the others wait for it: what cannot be found out is a fact as well."""
    try:
        facts = _facts(config, question, device)
    except Exception as error:
        facts = {("failed", "cannot be looked at"): f"{type(error).__name__}: {error}"}
    return HostFacts(socket.gethostname(), rank, facts)


def _facts(config: RunConfig, question: Question, device: torch.device) -> Facts:
    facts: Facts = {("package", name): version for name, version in package_versions().items()}
    python = platform.python_version_tuple()
    facts["python", "python"] = ".".join(python[:2])
    facts["detail", "python"] = ".".join(python)
    facts["detail", "machine"] = platform.machine()
    facts["source", "the engine's source"] = source_version()
    facts |= {("settings", f"{name}:"): _digest(value.encode()) for name, value in _sections(config).items()}
    facts |= _variables(config)
    facts |= _device_facts(device)
    facts["shared", "run.output"] = _look_for(question)
    facts |= {("data", f"{name} {path}"): _fingerprint(Path(path)) for name, path in _data_files(config).items()}
    facts |= {("data", f"the shard {path}"): _num_bytes(path) for path in question.shards}
    facts |= {("model", f"{name} {path}"): _fingerprint(Path(path)) for name, path in _models(config).items()}
    return facts


def source_version(root: Path = ENGINE) -> str:
    """A digest of the engine's files decides; git's revision, where git answers, is for the reader."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    revision = git("rev-parse", "--short=10", "HEAD")
    return f"{digest.hexdigest()[:12]}" + (f" (commit {revision})" if revision else "")


def _sections(config: RunConfig) -> dict[str, str]:
    return {name: repr(getattr(config, name)) for name in type(config).model_fields}


def _variables(config: RunConfig) -> Facts:
    facts = {("required variable", name): os.environ.get(name, UNSET) for name in VARIABLES_THAT_MUST_AGREE}
    facts |= {("variable", name): os.environ.get(name, UNSET) for name in VARIABLES}
    by_s3 = any(address.startswith("s3://") for address in _addresses(config).values())
    s3 = "required credential" if by_s3 else "credential"
    facts |= {(s3, name): "set" if os.environ.get(name) else UNSET for name in S3_CREDENTIALS}
    return facts | {("credential", name): "set" if os.environ.get(name) else UNSET for name in HUB_CREDENTIALS}


def _device_facts(device: torch.device) -> Facts:
    if device.type != "cuda":
        return {("accelerator", "accelerator"): device.type}
    properties = torch.cuda.get_device_properties(device)
    nccl = torch.cuda.nccl.version()
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return {
        ("accelerator", "accelerator"): "cuda",
        ("accelerator", "NCCL"): ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl),
        ("detail", "GPU"): properties.name,
        ("detail", "GPU memory"): f"{properties.total_memory / 1e9:.1f} GB",
        ("detail", "CUDA of the driver"): f"{driver // 1000}.{driver % 1000 // 10}",
    }


def _look_for(question: Question) -> str:
    if question.problem is not None:
        return f"cannot be written ({question.problem})"
    path, answer = Path(question.path), ""
    for pause_seconds in _SIGHT_PAUSES_SECONDS:
        time.sleep(pause_seconds)
        try:
            if path.read_text() == question.token:
                return SHARED
            answer = "another file"
        except FileNotFoundError:
            answer = "rank 0's file is not seen"
        except OSError as error:
            answer = f"cannot be read ({error.strerror})"
    return answer


def _addresses(config: RunConfig) -> dict[str, str]:
    """Of the data, by the settings that name them."""
    named = {
        "data.manifest": config.data.manifest,
        "evaluation.manifest": config.evaluation.manifest,
        "teacher.cache": _cache_file(config),
        "zero": config.zero if isinstance(config.zero, str) else None,
    }
    return {name: address for name, address in named.items() if address is not None}


def _cache_file(config: RunConfig) -> str | None:
    cache = config.teacher.cache if config.teacher.kind == "cached" else None
    try:
        return cache_address(cache, config.data.manifest) if cache else None
    except StillhouseError:  # told where the cache is opened
        return None


def _data_files(config: RunConfig) -> dict[str, str]:
    return {name: address for name, address in _addresses(config).items() if "://" not in address}


def _models(config: RunConfig) -> dict[str, str]:
    """Folders, or names of a hub, which are there on no host."""
    student = config.student
    named = {
        "teacher.model": config.teacher.model,
        "student.model": student.model,
        "student.config": student.config if isinstance(student.config, str) else None,
        "task.tokenizer": config.task.tokenizer,
        "evaluation.control": config.evaluation.control,
    }
    return {name: path for name, path in named.items() if path is not None}


def _outer_shards(config: RunConfig) -> tuple[str, ...]:
    """The first and the last shard of rank 0's manifest. One that cannot be read is told where it is opened."""
    address = config.data.manifest
    try:
        if is_remote(address):
            return ()
        shards = Manifest.from_json(read_bytes(address).decode(), address).shards
        outer = [shard for shard in (*shards[:1], *shards[-1:]) if not shard.name.startswith(PIPE)]
        return tuple(beside(address, shard.name) for shard in outer if "://" not in shard.name)
    except (StillhouseError, UnicodeDecodeError):
        return ()


def _num_bytes(path: str) -> str:
    try:
        return f"{os.stat(path).st_size:,} bytes"
    except OSError as error:
        return ABSENT if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def _fingerprint(path: Path) -> str:
    """Of a file: its size and up to a MiB of it, spread evenly. Of a folder: names, sizes and some bytes of its files.

    Bounded, so that a thousand hosts may ask a shared file system at once; what is read later is checked by its own
    sums.
    """
    try:
        if path.is_dir():
            content = b"".join(_folder_parts(path))
        else:
            content = _sampled(path, _FILE_BLOCKS)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return ABSENT if missing else f"cannot be read ({error.strerror})"
    return _digest(content)


def _folder_parts(folder: Path) -> Iterator[bytes]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in files:
        yield f"{path.name}\0{path.stat().st_size}\n".encode()
    for path in files[:: len(files) // _MAX_FILES + 1]:
        yield _sampled(path, _WEIGHT_BLOCKS)


def _sampled(path: Path, num_blocks: int) -> bytes:
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes <= num_blocks * _BLOCK_BYTES:
            return file.read()
        parts = [str(num_bytes).encode()]
        for block in range(num_blocks):
            file.seek((num_bytes - _BLOCK_BYTES) * block // (num_blocks - 1))
            parts.append(file.read(_BLOCK_BYTES))
    return b"\n".join(parts)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
