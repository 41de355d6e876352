"""A cache that does not fit is refused with both sides named; a damaged one costs no more than what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import Distiller
from engine.cache.claims import Claims
from engine.cache.sidecar import HEAD_BYTES, INDEX_DTYPE
from engine.errors import CacheError, CheckpointError, ConfigError, DataError
from tests import tiny
from tests.caching import CODECS, cached_run, make_cache
from tests.refusals import refused
from tests.serving import Server, as_s3, in_a_hurry
from tests.sharding import flip_a_bit


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a cache, to be copied."""
    root = tmp_path_factory.mktemp("made")
    for codec in CODECS:
        make_cache(cached_run(root, codec=codec))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def cached(root: Path, codec: str = "sampled") -> Path:
    return root / "train" / codec


def fails(config: dict[str, Any], error: type[DataError] | type[CacheError], *words: str) -> None:
    with pytest.raises(error) as caught:
        Distiller(config).fit()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x10
    path.write_bytes(content)


def test_another_teacher_of_the_same_name(root: Path) -> None:
    shutil.rmtree(root / "teacher")
    tiny.model_folder(root / "teacher", "causal_lm", seed=1)
    words = "teacher: the cache has", f"the run has {root / 'teacher'}"
    refused(cached_run(root), CacheError, "was made for something else", *words)
    with pytest.raises(CacheError, match="this cache holds other targets; teacher: it has"):
        make_cache(cached_run(root))


def test_a_teacher_of_the_same_tensors_in_other_files(root: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(root / "teacher").save_pretrained(root / "again", max_shard_size="40KB")
    assert len(list((root / "again").glob("*.safetensors"))) > 1
    (root / "again" / "consolidated.safetensors").write_bytes(b"the same weights in another cut, which nobody loads")
    tiny.tokenizer().save_pretrained(root / "again")
    assert make_cache(cached_run(root, teacher={"model": str(root / "again")})).manifest() is not None


def test_another_tokenizer(root: Path) -> None:
    path = cached(root) / "cache.json"
    path.write_text(path.read_text().replace('"tokenizer": "', '"tokenizer": "00'))
    refused(cached_run(root), CacheError, "tokenizer: the cache has 00", ", the run has")


@pytest.mark.parametrize("change", [{"seed": 9}, {"sequence_tokens": 24}])
def test_other_data_of_the_same_names(root: Path, change: dict[str, int]) -> None:
    for path in (root / "train").glob("*.*"):
        path.unlink()
    tiny.shards(root / "train", "causal_lm", **change)
    config = cached_run(root)
    fails(config, CacheError, "was made for other data: shard-00000", "had sha256", ", expected")
    with pytest.raises(CacheError, match="ranks sha256: it has"):
        make_cache(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask_seed": 1}, "task mask_seed: the cache has 0, the run has 1"),
        ({"mask_fraction": 0.3}, "task mask_fraction: the cache has 0.15, the run has 0.3"),
        ({"mask_rounds": 4}, "num rounds: the cache has 3, the run has 4"),
    ],
)
def test_other_masks(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    config = cached_run(tmp_path, "masked_lm")
    make_cache(config)
    config["task"] |= change
    refused(config, CacheError, named)


def test_targets_that_are_not_for_these_inputs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a later version masked or packed otherwise: the hashes of what the models are given tell."""
    from engine.tasks.causal_lm import CausalLM

    own = CausalLM.label

    def shifted(self: CausalLM, samples: Any, rounds: Any) -> Any:
        ids, labels = own(self, samples, rounds)
        return ids, labels.copy() * 1 + (labels == 7)

    monkeypatch.setattr(CausalLM, "label", shifted)
    fails(cached_run(root), CacheError, "are not for the ids, documents and masks that the run gives")


def test_a_shard_that_was_built_anew_is_found_before_the_first_step(root: Path) -> None:
    tiny.shards(root / "other", "causal_lm", seed=9)
    paths = [root / folder / "manifest.json" for folder in ("train", "other")]
    ours, theirs = (json.loads(path.read_text()) for path in paths)
    ours["shards"][2] = theirs["shards"][2]
    paths[0].write_text(json.dumps(ours))
    words = "shard-000002.targets.tar: was made for other data: shard-000002.tar had sha256", "expected"
    refused(cached_run(root), CacheError, *words)


def test_the_folder_of_other_shards_is_no_place_for_a_cache(root: Path) -> None:
    manifest = root / "heldout" / "manifest.json"
    before = manifest.read_bytes()
    with pytest.raises(CacheError, match=r"this folder holds something else, and a cache would replace its manifest"):
        make_cache(cached_run(root, teacher={"cache": str(manifest.parent)}))
    assert manifest.read_bytes() == before


def test_a_damaged_manifest_of_the_cache(root: Path) -> None:
    (cached(root) / "manifest.json").write_text("{")
    fails(cached_run(root), CacheError, "manifest.json: damaged", "delete this file")
    assert not (root / "runs" / "run").exists()


@pytest.mark.parametrize("keep", [100, HEAD_BYTES + 10, 9000, -1])
def test_a_truncated_sidecar(root: Path, keep: int) -> None:
    path = cached(root) / "shard-000000.targets.tar"
    path.write_bytes(path.read_bytes()[:keep])
    fails(cached_run(root), CacheError, str(path), "cut short", "delete this file and run")
    path.unlink()
    assert make_cache(cached_run(root)).manifest() is not None
    Distiller(cached_run(root)).fit()


def test_a_flipped_bit_in_header_and_index(root: Path) -> None:
    path = cached(root) / "shard-000000.targets.tar"
    whole = path.read_bytes()
    for byte, named in ((700, ""), (HEAD_BYTES + 50, "its index is damaged (sha256 differs)")):
        flip(path, byte)
        fails(cached_run(root), CacheError, str(path), named)
        path.write_bytes(whole)


def test_a_damaged_record_is_skipped_up_to_the_limit(root: Path) -> None:
    path = cached(root) / "shard-000000.targets.tar"
    flip(path, HEAD_BYTES + 48 * INDEX_DTYPE.itemsize + 3000)
    long = {"num_steps": None, "num_epochs": 1.0}
    fails(cached_run(root, run=long), DataError, str(path), "flipped bits (its CRC-32 differs)",
          "data.max_bad_samples is 0")  # fmt: skip
    assert Distiller(cached_run(root, run=long | {"name": "skips"}, data={"max_bad_samples": 1})).fit()


def test_a_sample_that_was_damaged_when_the_teacher_was_asked(root: Path) -> None:
    """It has an empty record in every round; a run skips it, and says what to do once the data is mended."""
    shard = root / "train" / "shard-000000.tar"
    whole = shard.read_bytes()
    flip_a_bit(shard)
    config = cached_run(root, teacher={"cache": "damaged"})
    with pytest.raises(DataError, match=r"flipped bits.*\n.*data\.max_bad_samples is 0"):
        make_cache(config)
    allowed = {"max_bad_samples": 1}
    folder = make_cache(cached_run(root, teacher={"cache": "damaged"}, data=allowed))
    sidecar = folder.sidecar_called("shard-000000.targets.tar")
    assert [number for number in range(sidecar.header.num_records) if not sidecar.index["num_bytes"][number]] == [20]
    long = {"num_steps": None, "num_epochs": 1.0}
    assert Distiller(cached_run(root, teacher={"cache": "damaged"}, data=allowed, run=long)).fit()
    shard.write_bytes(whole)
    fails(cached_run(root, teacher={"cache": "damaged"}, run=long | {"name": "mended"}), DataError,
          "record 20 is empty: its sample was damaged", "delete this file and run")  # fmt: skip


def test_a_sidecar_of_another_shard_renamed(root: Path) -> None:
    (cached(root) / "shard-000001.targets.tar").replace(cached(root) / "shard-000000.targets.tar")
    shutil.copy(cached(root, "top_k") / "shard-000001.targets.tar", cached(root))
    fails(cached_run(root), CacheError, "shard-00000")
    shutil.copy(cached(root) / "shard-000002.targets.tar", cached(root) / "shard-000001.targets.tar")
    fails(cached_run(root), CacheError, "was made for the shard shard-00000", ", expected shard-00000")


def test_a_sidecar_of_another_cache(root: Path) -> None:
    for number in range(3):
        name = f"shard-{number:06d}.targets.tar"
        shutil.copy(cached(root, "top_k") / name, cached(root) / name)
    fails(cached_run(root), CacheError, "is of another cache: of the one with the hash")


def test_missing_shards_are_named(root: Path) -> None:
    (cached(root) / "shard-000001.targets.tar").unlink()
    words = "has no targets for 1 of 3 shards: shard-000001.tar", "run launch/cache_teacher.py again", "on_missing: ask"
    refused(cached_run(root), CacheError, *words)


def test_a_cache_still_being_written(root: Path) -> None:
    (cached(root) / "shard-000001.targets.tar").unlink()
    with Claims(cached(root) / "claims") as claims:
        claims.take("shard-000001.targets.tar")
        words = "shards: shard-000001.tar; it is still being written: shard-000001.targets.tar is being made by process"
        refused(cached_run(root), CacheError, words, "Wait until it is complete")


def test_no_cache_at_all(root: Path) -> None:
    refused(cached_run(root, teacher={"cache": "nowhere"}), CacheError, "nowhere/cache.json: there is no cache",
            "launch/cache_teacher.py")  # fmt: skip


def test_a_run_goes_on_with_the_cache_it_began_with(root: Path) -> None:
    Distiller(cached_run(root, run={"num_steps": 5}, schedule={"kind": "constant"})).fit()
    shutil.rmtree(cached(root))
    make_cache(cached_run(root, cache={"seed": 4}))
    with pytest.raises(CheckpointError, match=r"was trained on other data .*cache_sha256"):
        Distiller(cached_run(root, schedule={"kind": "constant"})).fit()


def test_a_newer_format(root: Path) -> None:
    path = cached(root) / "cache.json"
    for change, named in (({"format_version": 2}, "format version 2 is newer"),
                          ({"codec": {"kind": "sampled", "version": 9}}, "codec sampled, version 9"),
                          ({"codec": {"kind": "wavelets", "version": 1}}, "codec wavelets")):  # fmt: skip
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        refused(cached_run(root), CacheError, named, "update")
        path.write_text(before)
    path.write_text("{")
    refused(cached_run(root), CacheError, "damaged")


def test_ranks_that_were_changed(root: Path) -> None:
    flip(cached(root) / "ranks.npy", 200)
    fails(cached_run(root), CacheError, "ranks.npy: not the file that cache.json names (sha256 differs)")


TERMS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("sampled", {"kind": "reverse_kl"}, {}, "sampled serves forward_kl alone"),
    ("sampled", {"kind": "forward_kl", "temperature": 2.0}, {}, "its temperature must be the cache's, 1"),
    ("sampled", {"kind": "forward_kl", "temperature": {"start": 1.0, "end": 2.0}}, {}, "must be the cache's"),
    ("sampled", {"kind": "forward_kl", "restrict_to": "all"}, {}, "keeps the positions with a label"),
    ("sampled", {"kind": "hidden_cosine"}, {}, "it needs hidden states"),
    ("top_k", {"kind": "logits_mse"}, {}, "top_k with tail: bucket serves all but logits_mse"),
    ("top_k", {"kind": "js"}, {"tail": "renormalise"}, "top_k with tail: renormalise serves forward_kl alone"),
    ("hidden", {"kind": "hidden_mse", "layers": [[2, 4]]}, {}, "keeps the states before the head alone"),
]


@pytest.mark.parametrize(("codec", "term", "teacher", "named"), TERMS)
def test_terms_that_the_codec_cannot_serve(
    root: Path, codec: str, term: dict[str, Any], teacher: dict[str, Any], named: str
) -> None:
    config = cached_run(root, codec=codec, teacher=teacher, losses=[{"kind": "cross_entropy"}, term])
    refused(config, CacheError, "cannot serve", f"losses.1 ({term['kind']}): ", named)


def test_a_temperature_that_is_approximated_is_said_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = cached_run(root, codec="top_k", losses=[{"kind": "forward_kl", "temperature": 2.0}])
    assert Distiller(config).fit()
    told = " ".join(capsys.readouterr().err.split())
    assert "at another temperature than the cache's 1 is approximated: the kept ids are exact" in told


def test_hidden_terms_from_layers_that_were_kept(root: Path) -> None:
    layers = {"codec": {"kind": "hidden", "dtype": "fp32", "layers": [2, 4]}}
    term = {"kind": "hidden_mse", "layers": [[1, 2], [2, 4]]}
    make_cache(cached_run(root, teacher={"cache": "layers"}, cache=layers))
    ours = cached_run(root, teacher={"cache": "layers"}, losses=[term], run={"name": "cached"})
    theirs = cached_run(root, teacher={"kind": "online", "cache": None}, losses=[term], run={"name": "online"})
    told = []
    for config in (ours, theirs):
        Distiller(config).fit()
        lines = (root / "runs" / config["run"]["name"] / "metrics.jsonl").read_text().splitlines()
        told.append([json.loads(line).get("loss/hidden_mse") for line in lines])
    assert told[0] == told[1]
    lacking = cached_run(root, teacher={"cache": "layers"}, losses=[term | {"layers": [[1, 3]]}])
    refused(lacking, CacheError, "keeps teacher layers [2, 4], not [3]")
    with pytest.raises(ConfigError, match=r"cache\.codec\.layers: there is no layer 5; the teacher has 4"):
        make_cache(cached_run(root, teacher={"cache": "beyond"}, cache={"codec": {"kind": "hidden", "layers": [5]}}))


def test_what_to_make_must_be_said(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"give teacher\.model and teacher\.cache"):
        make_cache(cached_run(root, teacher={"model": None}, student={"config": tiny.LLAMA, "init": None,
                                                                      "layers": None}))  # fmt: skip


def test_a_cache_on_a_web_server_and_on_s3(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_hurry(monkeypatch)
    server, store = Server(root / "train"), Server(root)
    as_s3(store, monkeypatch)
    here = cached_run(root, run={"name": "here"})
    there = cached_run(root, run={"name": "there"}, data={"manifest": f"{server.address}/manifest.json"},
                       teacher={"cache": f"{server.address}/sampled"})  # fmt: skip
    by_name = cached_run(root, run={"name": "name"}, data={"manifest": f"{server.address}/manifest.json"})
    in_bucket = cached_run(root, run={"name": "bucket"}, data={"manifest": "s3://train/manifest.json"},
                           teacher={"cache": "s3://train/sampled"})  # fmt: skip
    configs = (here, there, by_name, in_bucket)
    for config in configs:
        Distiller(config).fit()
    told = [(root / "runs" / config["run"]["name"] / "metrics.jsonl").read_text().splitlines() for config in configs]
    losses = [[json.loads(line).get("loss/forward_kl") for line in lines] for lines in told]
    assert losses[0] == losses[1] == losses[2] == losses[3]
    for each in (server, store):
        wanted = [asked for name, asked in each.requests if name.endswith(".targets.tar")]
        assert wanted, "it was read"
        assert all(wanted), "by ranges, not as whole files"
    (cached(root) / "manifest.json").unlink()
    refused(there, CacheError, "manifest.json: missing; copy the cache there when it is complete")
    with pytest.raises(CacheError, match="a cache is made in a folder"):
        make_cache(there)
