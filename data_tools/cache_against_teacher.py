"""The teacher asked anew about some samples of a cache: how far the cache is from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.cache_checks import CacheCheck
from data_tools.cache_records import States
from data_tools.target_errors import Probabilities, TargetErrors
from engine.asking import read_batch
from engine.cache.recording import Asked, build_recorder
from engine.cache.sidecar import Record, Sidecar
from engine.config.cache import CacheSection, HiddenSection
from engine.config.run import RunConfig
from engine.data.spread import spread
from engine.errors import CacheError, ConfigError, DataError, StillhouseError
from engine.losses.head import head_logits
from engine.models import DTYPES, MODEL_CLASSES, cast, load_model, move
from engine.parts import check_model
from engine.schema import DenseTargets
from engine.teacher.fingerprint import fingerprint_teacher
from engine.teacher.online import OnlineTeacher

_BLOCK_ROWS = 256


class Answer(NamedTuple):
    """What the teacher says now about one record's sample."""

    truth: Probabilities | States
    record: Record
    """what a fresh capture would write"""


class Place(NamedTuple):
    """A record of the cache."""

    shard: int
    sidecar: Sidecar
    number: int


def compare_with_teacher(config: RunConfig, check: CacheCheck, num_samples: int) -> tuple[list[str], list[str]]:
    """Lines that tell how near the cache is, and the problems. Raises ConfigError for a teacher that does not load."""
    if config.teacher.model is None:
        raise ConfigError("--against-teacher: teacher.model is not given; name the teacher that the cache was made of")
    identity = check.folder.identity
    lines, problems = [], []
    if (found := fingerprint_teacher(config.teacher)) == identity.teacher:
        lines.append(f"teacher: {config.teacher.model}, fingerprint {found[:12]}, as in the cache")
    else:
        problems.append(
            f"{check.folder.address}: made of the teacher {identity.teacher_name} with fingerprint "
            f"{identity.teacher[:12]}, but teacher.model {config.teacher.model} has {found[:12]}; name the cache's own "
            "teacher, or make the cache anew"
        )
    if check.reader is None or not check.is_of_task:
        return [*lines, "the teacher was not asked: no record can be compared before the problems below are mended"], (
            problems
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = _Teacher(config, check, device)
    errors, num_equal, places = TargetErrors(check.reader.section, identity.teacher_precision), 0, []
    for place in _spread(check, num_samples):
        try:
            record = place.sidecar.read(place.number)
            decoded = check.reader.sound(place.sidecar, place.number)
        except (DataError, CacheError) as problem:
            problems.append(str(problem))
            continue
        answer = teacher.ask(place)
        places.append(place)
        num_equal += answer.record.content == record.content
        figures = (record.nll - answer.record.nll, record.entropy - answer.record.entropy)
        for far in errors.add(decoded, answer.truth, None if teacher.is_imported else max(map(abs, figures))):
            if not teacher.is_imported:
                problems.append(f"{place.sidecar.place(place.number)}: {far}; make the cache anew")
    lines.append(f"asked about {len(places)} samples in {teacher.precision} on {device.type}:")
    lines += [f"  {line}" for line in errors.lines()] if places else []
    if teacher.is_imported:
        lines.append("  what was imported was made by other means, so how near it should be is not known")
    else:
        lines.append(f"  byte-identical to a fresh capture: {num_equal} of {len(places)} records")
    return lines, problems


def _spread(check: CacheCheck, count: int) -> Iterator[Place]:
    """Samples evenly over the sidecars that can be opened, with their rounds in turn."""
    lengths = []
    for entry in check.shards.manifest.shards:
        try:
            lengths.append(check.folder.sidecar(entry).header.num_samples)
        except StillhouseError:
            lengths.append(0)  # it is told of already
    for turn, (shard, sample) in enumerate(spread(lengths, count)):
        sidecar = check.folder.sidecar(check.shards.manifest.shards[shard])
        rounds = sidecar.header.num_rounds
        yield Place(shard, sidecar, sample * rounds + turn % rounds)


class _Teacher:
    """teacher.model, asked just as the job was that made the cache."""

    def __init__(self, config: RunConfig, check: CacheCheck, device: torch.device) -> None:
        assert check.reader is not None
        self._check, self._device = check, device
        identity, section = check.folder.identity, check.reader.section
        self.is_imported = identity.teacher_precision not in DTYPES
        self.precision = "fp32" if self.is_imported else identity.teacher_precision
        model = load_model(config.teacher, MODEL_CLASSES[check.task.kind], torch.float32, "teacher")
        check_model(model, check.task, "teacher", identity.vocab_size, check.shards.manifest)
        layers = isinstance(section, HiddenSection) and bool(section.layers)
        model = move(cast(model, DTYPES[self.precision]), device)
        self._teacher = OnlineTeacher(model, check.task, hidden_states=layers)
        cache = CacheSection(codec=section, temperature=identity.temperature, seed=identity.seed)
        self._recorder = build_recorder(cache, check.folder.ranks(), self._teacher.head, identity.vocab_size)

    def ask(self, place: Place) -> Answer:
        """The whole micro-batch of the record is asked: the last digit of the teacher's numbers depends on it."""
        asked, at = self._asked(place)
        answer = self._teacher.states_for(asked.batch, asked.batch.label_rows)
        selected = self._recorder.select(asked, answer)
        record, _ = self._recorder.encode(selected)[at]
        rows = answer.hidden.split(selected.lengths)[at]
        if isinstance(selected.kept, DenseTargets):
            num_tokens = [len(sample.token_ids) for sample in asked.samples]
            layers = [layer.split(num_tokens)[at] for layer in selected.kept.hidden_states]
            return Answer(States(rows.cpu(), layers), record)
        blocks = rows.split(_BLOCK_ROWS)
        return Answer(Probabilities([len(block) for block in blocks], map(self._probabilities, blocks)), record)

    def _probabilities(self, rows: Tensor) -> Tensor:
        """[C, V] float64 of states before the head."""
        identity = self._check.folder.identity
        logits = head_logits(rows, self._teacher.head, identity.vocab_size).double() / identity.temperature
        return torch.softmax(logits, dim=1).cpu()

    def _asked(self, place: Place) -> tuple[Asked, int]:
        header, size = place.sidecar.header, self._check.folder.identity.micro_sequences
        start = place.number // size * size
        records = range(start, min(start + size, header.num_records))
        check = self._check
        # a damaged sample is left out, as it was when the cache was made
        asked = read_batch(check.shards, check.task, place.shard, header.num_rounds, records, lambda *_: None)
        return asked.to(self._device), place.number - start
