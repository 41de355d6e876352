"""What DistillKit captured trains a student here: same tokens, same probabilities, or a refusal with the row."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from benchmarks.distillkit_scheme import encode
from data_tools import distillkit_cache, verify_cache
from data_tools.distillkit_config import DistillKitConfig, ResidualBin
from data_tools.distillkit_format import decode
from data_tools.import_distillkit import main
from engine import Distiller
from engine.cache.folder import CacheFolder
from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.data.shards import ShardSet
from engine.errors import CacheError, DataError, StillhouseError
from engine.schema import SparseTargets
from engine.teacher.cached import CachedTargets
from tests import tiny
from tests.caching import FORWARD_KL, files_of
from tests.launching import write_config
from tests.refusals import parts_of, refused

ROOT = Path(__file__).parents[2]
VOCAB = 96
MAX_ERROR = 0.02
BINS = (ResidualBin("float32", 12, 12),)
CONFIG = DistillKitConfig(VOCAB + 1, 24, 8, BINS, "bfloat16", (0, 1, "sqrt"), delta_encoding=False)
STUDENT = {"init": None, "layers": None, "config": tiny.LLAMA | {"num_hidden_layers": 2}}
LENGTHS = [32, 17, 24, 9, 2, 32, 30, 21, 32, 13] * 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its capture and what was imported of it: some 8 samples a shard."""
    root = tmp_path_factory.mktemp("distillkit")
    tiny.run_config(root)
    capture(root)
    assert main(arguments(root, "imported", "--teacher", str(root / "teacher"))) == 0
    return root


@cache
def teacher_rows() -> list[tuple[list[int], torch.Tensor]]:
    """Tokens, and the teacher's log-probabilities at each."""
    teacher = tiny.model("causal_lm").eval()
    rng = np.random.default_rng(3)
    rows = []
    for length in LENGTHS:
        ids = rng.integers(5, VOCAB, length).tolist()
        with torch.no_grad():
            rows.append((ids, torch.log_softmax(teacher(torch.tensor([ids])).logits[0].float(), dim=1)))
    return rows


def row_of(ids: list[int], log_p: torch.Tensor, config: DistillKitConfig = CONFIG) -> dict[str, Any]:
    packed_ids, packed_values = encode(config, log_p)
    return {
        "input_ids": ids,
        "compressed_logprobs": packed_values.tolist(),
        "bytepacked_indices": packed_ids.tolist(),
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    nested = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
    kinds = {
        "compressed_logprobs": nested,
        "bytepacked_indices": nested,
        "attention_mask": pyarrow.list_(pyarrow.int64()),
    }
    names = rows[0] if rows else ("input_ids", "compressed_logprobs", "bytepacked_indices")
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.list_(pyarrow.uint64()))) for name in names])
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=4)


def write_settings(folder: Path, config: DistillKitConfig = CONFIG) -> None:
    content = asdict(config)
    content["residual_bins"] = list(content["residual_bins"])
    content["polynomial_terms"] = list(content["polynomial_terms"])
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(content))


def capture(root: Path) -> None:
    """Two files; every other row lacks the position of its last token, as raw captures do."""
    rows = [row_of(ids, log_p[: len(ids) - number % 2]) for number, (ids, log_p) in enumerate(teacher_rows())]
    write_parquet(root / "captured" / "data_0.parquet", rows[:19])
    write_parquet(root / "captured" / "data_1.parquet", rows[19:])
    write_settings(root / "captured")


def arguments(root: Path, output: str, *more: str, captured: str = "captured") -> list[str]:
    fixed = ["--input", str(root / captured), "--compression", str(root / captured / "compression_config.yaml")]
    fixed += ["--tokenizer", str(root / "teacher"), "--output", str(root / output), "--max-error", str(MAX_ERROR)]
    return [*fixed, "--shard-samples", "8", "--workers", "1", *more]


def run_of(root: Path, output: str = "imported", **sections: Any) -> dict[str, Any]:
    losses = [*FORWARD_KL, {"kind": "reverse_kl", "weight": 0.1}]
    config = tiny.run_config(root, losses=losses, teacher={"kind": "cached", "cache": "distillkit"})
    config["data"] = config["data"] | {"manifest": str(root / output / "manifest.json"), "lanes": 2}
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values
    return config


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(config: dict[str, Any]) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each sample: its name, labels, and the probabilities [P, V] and tail [P] that training takes."""
    parts = parts_of(config)
    assert parts.cache is not None
    source = CachedTargets(parts.cache, parts.shards.manifest, "bucket", torch.device("cpu"))
    counts = parts.shards.manifest.samples_per_shard
    order = DataOrder(counts, seed=1, lanes=1, shuffle_samples=1)
    loader = Loader(parts.shards, order, parts.task.label, num_steps=sum(counts), global_sequences=1,
                    micro_sequences=1, cached=source)  # fmt: skip
    found = []
    for step in loader.steps():
        (batch,) = step.micro_batches
        targets = source.targets_for(batch, batch.label_rows)
        assert isinstance(targets, SparseTargets)
        assert targets.tail is not None
        p = torch.zeros(len(targets.ids), VOCAB).scatter_add_(1, targets.ids, targets.weights)
        assert not targets.nll.any()
        labels = batch.labels.flatten()[batch.label_rows]
        found.append((batch.names[0], labels.numpy(), p.numpy(), targets.tail.numpy()))
    return sorted(found, key=lambda sample: sample[0])


def test_samples_are_the_rows_and_targets_are_what_distillkit_reads(root: Path) -> None:
    samples = kept(run_of(root))
    expected = teacher_rows()
    assert len(samples) == len(expected) == len(LENGTHS)
    for (name, labels, p, tail), (ids, log_p) in zip(samples, expected):
        assert labels.tolist() == ids[1:], name
        read_ids, read = decode(CONFIG, *encode(CONFIG, log_p[:-1]))
        ours = np.take_along_axis(p, read_ids, axis=1)
        assert (np.count_nonzero(p, axis=1) == CONFIG.k).all(), name
        assert np.abs(np.log(ours) - read).max() < MAX_ERROR + 0.02, name
        assert np.abs(tail - (1 - np.exp(read).sum(axis=1))).max() < 0.02, name


def test_a_student_trains_and_no_perplexity_of_the_teacher_is_shown(root: Path) -> None:
    Distiller(run_of(root, run={"name": "student", "num_steps": 16}, student=STUDENT)).fit()
    lines = records(root / "runs/student")
    losses = [line["loss/forward_kl"] for line in lines if "loss/forward_kl" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert not any("teacher/perplexity" in line for line in lines)
    assert (root / "runs/student/report.html").exists()


def test_a_capture_of_all_ids_trains_as_the_teacher_does(root: Path) -> None:
    config = DistillKitConfig(VOCAB, VOCAB, VOCAB, (), "float32", delta_encoding=True)
    write_parquet(root / "full" / "data_0.parquet", [row_of(*row, config) for row in teacher_rows()])
    write_settings(root / "full", config)
    assert (
        main(arguments(root, "all", "--teacher", str(root / "teacher"), "--max-error", "0.001", captured="full")) == 0
    )
    cached = run_of(root, "all", run={"name": "cached"})
    online = run_of(root, "all", run={"name": "online"}, teacher={"kind": "online", "cache": None})
    for run in (cached, online):
        Distiller(run).fit()
    ours, theirs = records(root / "runs/cached"), records(root / "runs/online")
    for name in ("loss/forward_kl", "loss/reverse_kl", "loss/cross_entropy"):
        of_ours, of_theirs = ([line[name] for line in lines if name in line] for lines in (ours, theirs))
        assert of_ours == pytest.approx(of_theirs, rel=5e-3), name


def test_a_capture_whose_teacher_is_not_named_trains(root: Path, tmp_path: Path) -> None:
    """Its fingerprint is that of the files, so no model may claim to be it."""
    assert main(arguments(root, "unnamed")) == 0
    sections = {"run": {"name": "unnamed"}, "task": {"tokenizer": str(root / "teacher")}, "student": STUDENT}
    refused(run_of(root, "unnamed", **sections), CacheError, "teacher", "captured")
    Distiller(run_of(root, "unnamed", teacher={"model": None}, **sections)).fit()
    named, unnamed = (CacheFolder.open(str(root / name / "distillkit/cache.json")) for name in ("imported", "unnamed"))
    assert named.identity.teacher != unnamed.identity.teacher
    assert unnamed.identity.teacher_name == str(root / "captured")


def test_the_teacher_can_be_asked_about_an_import(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How near it should be is not known, so it is told and not judged."""
    run = write_config(tmp_path / "run.yaml", run_of(root))
    assert verify_cache.main(["--config", str(run), "--workers", "1", "--against-teacher", "4"]) == 0
    told = capsys.readouterr().out
    assert "asked about 4 samples in fp32" in told
    assert "largest error of a log-probability: 0.0" in told
    assert "-log p of labels" not in told, "the import does not know it"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_same_input_gives_the_same_bytes(root: Path, workers: str) -> None:
    assert main([*arguments(root, f"again-{workers}", "--teacher", str(root / "teacher")), "--workers", workers]) == 0
    assert files_of(root / f"again-{workers}") == files_of(root / "imported")


def test_a_complete_import_is_left_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(root / "imported")
    assert main(arguments(root, "imported", "--teacher", str(root / "teacher"))) == 0
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(CacheError, match="max_error"):
        main(arguments(root, "imported", "--teacher", str(root / "teacher"), "--max-error", "0.1"))
    assert files_of(root / "imported") == before
    assert main(arguments(root, "imported", "--cache", "coarse", "--max-error", "0.1")) == 0
    assert {name for name in files_of(root / "imported") if not name.startswith("coarse/")} == set(before)


@pytest.mark.parametrize("cut", [[], ["--sequence-tokens", "15", "--cut"]], ids=["whole", "cut"])
def test_killed_it_goes_on_after_the_last_finished_shard(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: list[str]
) -> None:
    """Killed in the first shard, in the third and before the cache's manifest."""
    whole, killed = (arguments(root, str(tmp_path / name), *cut) for name in ("whole", "killed"))
    tokenizer = {"tokenizer": str(root / "teacher")}
    assert main(whole) == 0
    for writes in (0, 2):
        finish, left = distillkit_cache.SidecarWriter.finish, [writes]

        def until(self: Any, *given: Any, finish: Any = finish, left: list[int] = left) -> Any:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return finish(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(distillkit_cache.SidecarWriter, "finish", until)
            with pytest.raises(KeyboardInterrupt):
                main(killed)
        manifest = ShardSet.open(str(tmp_path / "killed/manifest.json")).manifest
        folder = CacheFolder.open(str(tmp_path / "killed/distillkit/cache.json"))
        assert len(manifest.shards) - len(folder.missing(manifest)) == writes
        refused(run_of(root, str(tmp_path / "killed"), teacher={"model": None}, student=STUDENT, task=tokenizer),
                CacheError, "has no targets for")  # fmt: skip
    assert main(killed) == 0
    (tmp_path / "killed/distillkit/manifest.json").unlink()
    assert main(killed) == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_long_rows_are_refused_or_cut(root: Path) -> None:
    with pytest.raises(DataError, match=r"data_0\.parquet, row 1: 32 tokens, more than --sequence-tokens 20.*--cut"):
        main(arguments(root, "short", "--sequence-tokens", "20"))
    assert main(arguments(root, "pieces", "--sequence-tokens", "20", "--cut", "--teacher", str(root / "teacher"))) == 0
    samples = kept(run_of(root, "pieces"))
    expected = [(ids[a : a + 20], log_p[a : a + 20]) for ids, log_p in teacher_rows() for a in range(0, len(ids), 20)]
    assert len(samples) == len(expected)
    for (name, labels, p, _), (ids, log_p) in zip(samples, expected):
        assert labels.tolist() == ids[1:], name
        top, rows = log_p[:-1].argmax(dim=1).numpy(), np.arange(len(ids) - 1)
        assert np.allclose(p[rows, top], log_p.exp().numpy()[rows, top], rtol=0.03), name


def test_packed_rows_keep_their_documents_apart(root: Path) -> None:
    """Rows as DistillKit's packing tool leaves them: the last position of a document points past it."""
    (first, log_p), (second, other), *_ = teacher_rows()
    row = row_of(first[:10] + second[:6], torch.cat([log_p[:10], other[:6]]))
    write_parquet(root / "packed" / "data_0.parquet", [row | {"attention_mask": [1] * 10 + [2] * 6}] * 3)
    write_settings(root / "packed")
    assert main(arguments(root, "from-packed", "--teacher", str(root / "teacher"), captured="packed")) == 0
    shards = ShardSet.open(str(root / "from-packed/manifest.json"))
    assert shards.read(0, 0).document_tokens.tolist() == [10, 6]
    assert shards.manifest.num_documents == 6
    _, labels, p, _ = kept(run_of(root, "from-packed"))[0]
    assert labels.tolist() == first[1:10] + second[1:6]
    wanted = torch.cat([log_p[:9], other[:5]]).exp().numpy()
    assert np.abs(p - wanted).max() < 0.03


def spoilt(name: str, row: dict[str, Any], log_p: torch.Tensor) -> tuple[dict[str, Any], DistillKitConfig]:
    ids, config = row["input_ids"], CONFIG
    if name == "missing column":
        del row["bytepacked_indices"]
    elif name == "token":
        row["input_ids"] = [*ids[:-1], VOCAB]
    elif name == "empty":
        row = {column: [] for column in row}
    elif name == "few positions":
        row = row_of(ids, log_p[:-2])
    elif name == "odd position":
        row["compressed_logprobs"][2] = row["compressed_logprobs"][2][:-1]
    elif name == "no number":
        row["compressed_logprobs"][1][:2] = [0xC0, 0x7F]  # bfloat16: not a number
    elif name == "no id":
        row = row_of(ids, torch.log_softmax(torch.nn.functional.pad(log_p, (0, 1), value=1.0), dim=1))
    elif name == "twice":
        row["bytepacked_indices"][3] = [0] * len(row["bytepacked_indices"][3])
    elif name == "padding":
        row["attention_mask"] = [1] * (len(ids) - 1) + [0]
    elif name == "null":
        row["input_ids"] = [*ids[:-1], None]
    elif name == "other settings":
        config = replace(CONFIG, residual_bins=())
    return row, config


REFUSALS = {
    "missing column": r"no column 'bytepacked_indices'; found \['input_ids', 'compressed_logprobs'\]",
    "token": r"row 2: token id 96, expected 0 to 95; give the tokenizer",
    "empty": r"row 2: no tokens",
    "few positions": r"row 2: bytepacked_indices of 15 positions, expected 16 or 17 for its 17 tokens",
    "odd position": r"row 2: compressed_logprobs: position 2 has 49 bytes, the settings ask for 50",
    "no number": r"row 2: position 1, rank 0: nan is no log-probability",
    "no id": r"row 2: position \d+, rank \d+: id 96, but the tokenizer has 96",
    "twice": r"row 2: position 3: an id is kept twice",
    "padding": r"row 2: attention_mask of 17 numbers from 0",
    "null": r"row 2: input_ids: a value is missing",
    "other settings": r"row 1: compressed_logprobs: position 0 has 50 bytes, the settings ask for 28",
}


@pytest.mark.parametrize(("name", "workers"), [*((name, "1") for name in REFUSALS), ("twice", "2")])
def test_bad_rows_are_refused_by_file_and_row(root: Path, tmp_path: Path, name: str, workers: str) -> None:
    (first, log_p), (second, other), *_ = teacher_rows()
    bad, config = spoilt(name, row_of(second, other), other)
    good = row_of(first, log_p) | ({"attention_mask": [1] * len(first)} if "attention_mask" in bad else {})
    if name == "missing column":
        del good["bytepacked_indices"]
    write_parquet(tmp_path / "captured" / "data_0.parquet", [good, bad])
    write_settings(tmp_path / "captured", config)
    given = arguments(root, str(tmp_path / "output"), captured=str(tmp_path / "captured"))
    with pytest.raises(DataError, match=rf"data_0\.parquet(: |, ){REFUSALS[name]}"):
        main([*given, "--workers", workers])
    assert not (tmp_path / "output/distillkit/manifest.json").exists()
    assert not list((tmp_path / "output").rglob("*.partial"))


def test_what_is_no_capture_is_refused(root: Path, tmp_path: Path) -> None:
    def fails(match: str, **changes: str) -> None:
        given = arguments(root, str(tmp_path / "output"), captured=str(tmp_path))
        for option, value in changes.items():
            given += [f"--{option}", value]
        with pytest.raises(StillhouseError, match=match):
            main(given)

    fails("compression_config.yaml: cannot be read")
    write_settings(tmp_path)
    fails("no parquet file")
    (tmp_path / "data_0.parquet").write_bytes(b"PAR1")
    fails("data_0.parquet: cannot be read as parquet")
    write_parquet(tmp_path / "data_0.parquet", [])
    fails("holds no rows")
    pyarrow.parquet.write_table(
        pyarrow.table({name: [1] for name in ("input_ids", "compressed_logprobs", "bytepacked_indices")}),
        tmp_path / "data_0.parquet",
    )
    fails("holds int64, expected a list")


def test_probabilities_above_one_are_scaled_down_and_told(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids, log_p = teacher_rows()[0]
    write_parquet(tmp_path / "captured" / "data_0.parquet", [row_of(ids, log_p + 1.0)] * 2)
    write_settings(tmp_path / "captured")
    with caplog.at_level("WARNING", logger="stillhouse"):
        given = arguments(root, "above", "--teacher", str(root / "teacher"), captured=str(tmp_path / "captured"))
        assert main(given) == 0
    assert "were more than 1 in all" in caplog.text
    assert np.allclose(kept(run_of(root, "above"))[0][2].sum(axis=1), 1.0, atol=1e-3)


def test_it_runs_as_a_command(root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "data_tools/import_distillkit.py"),
        *arguments(root, str(tmp_path / "command")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "30 sequences, 4 shards" in done.stdout
    assert "of the teacher's mass" in done.stdout
    assert "samples 30/30" in done.stderr
