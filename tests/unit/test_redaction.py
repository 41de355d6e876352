"""What is a secret goes, whatever stands around it; what only looks like one stays."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine.log import setup
from engine.redaction import redact, redact_all, redact_words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://bob:hunter22@host/data/manifest.json", "https://***@host/data/manifest.json"),
        ("https://bob:p@ss@host/x", "https://***@host/x"),
        ("cannot read s3://key:word@bucket/x?versionId=3", "cannot read s3://***@bucket/x?versionId=3"),
        (
            "https://h/x?X-Amz-Algorithm=A&X-Amz-Credential=AK%2F1&X-Amz-Signature=0a1b&n=1",
            "https://h/x?X-Amz-Algorithm=A&X-Amz-Credential=***&X-Amz-Signature=***&n=1",
        ),
        ("https://h/x?sig=abc%3D&sv=2", "https://h/x?sig=***&sv=2"),
        ("hf_token=abc def", "hf_token=*** def"),
        ("run.token=abc", "run.token=***"),
        ("--api-key abc --steps 3", "--api-key *** --steps 3"),
        ("{'password': 'abc', 'n': 1}", "{'password': '***', 'n': 1}"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("got hf_abcdefghijklmnopqrst there", "got *** there"),
        ("key AKIAABCDEFGHIJKLMNOP", "key ***"),
        ("api_key: 'my secret with spaces' rest", "api_key: '***' rest"),
        ('{"token": "bar \\"baz", "n": 1}', '{"token": "***", "n": 1}'),
        (r'"{\"token\": \"bar baz\", \"n\": 1}"', r'"{\"token\": \"***\", \"n\": 1}"'),
        ("--password 'a b c' --steps 3", "--password '***' --steps 3"),
        ("password='a", "password='***"),
        ("Authorization: Token abcdefghijk", "Authorization: Token ***"),
        ("{'Authorization': 'Basic abc', 'n': 1}", "{'Authorization': 'Basic ***', 'n': 1}"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=AK/1, Signature=ab", "Authorization: ***"),
        ("https://h/x?key=AIzaSyAAAA&alt=1", "https://h/x?key=***&alt=1"),
        ("AccountName=me;AccountKey=abcdef==;", "AccountName=me;AccountKey=***"),
        ("to AccountKey=abcdef==;", "to AccountKey=***"),
        ("pipe:curl -u bob:hunter22 https://h/x", "pipe:curl -u *** https://h/x"),
        ("pipe:curl --user 'bob:hunter 22' https://h/x", "pipe:curl --user '***' https://h/x"),
        ("pipe:curl -ubob:hunter22 https://h/x", "pipe:curl -u*** https://h/x"),
    ],
)
def test_secrets_go(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown, "what is masked stays as it is"


@pytest.mark.parametrize(
    "text",
    [
        "data.sequence_tokens=128 max_tokens: 4",
        "student/train tokens 12,000 at 3 tokens/s; num_tokens=12",
        "pad_token=[PAD] task.tokenizer=/models/tokenizer",
        "loss 0.5 @ step 3, https://host/a@b/manifest.json",
        "s3://bucket/train/manifest.json key.path=value cache.codec.keep=8",
        "/data/user@host/x",
        "a basic approach, token bucketing, authorization was refused",
        "pipe:curl -u https://h/x",
        "docker run -u 1000:1000 image",
        "password='' token=",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_variables_go_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, f"value-of-{name.lower()}")
        assert redact(f"a value-of-{name.lower()}b") == "a ***b"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi==")
    for form in ("abc%2Fdef%2Bghi%3D%3D", "abc%2fdef%2bghi%3d%3d", "abc/def%2Bghi%3D%3D"):
        assert redact(f"https://h/x?a={form}&n=1") == "https://h/x?a=***&n=1"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    monkeypatch.setenv("SHORT_TOKEN", "the")
    assert redact("the parallel way") == "the parallel way"


def test_nested_settings_and_command_lines() -> None:
    settings = {"a": [1, "https://u:p@h/x"], "hf_token": "abc", "b": {"c": None, "vocab_size": 3}}
    assert redact_all(settings) == {"a": [1, "https://***@h/x"], "hf_token": "***", "b": {"c": None, "vocab_size": 3}}
    odd = {"password": 12345678, "api_key": ["a", "b"], "token": True, "secret": None, "hf_token": ""}
    assert redact_all(odd) == odd | {"password": "***", "api_key": "***"}
    command = {"data": {"manifest": "pipe:curl -u bob:hunter22 https://h/manifest.json"}}
    assert redact_all(command) == {"data": {"manifest": "pipe:curl -u *** https://h/manifest.json"}}
    assert redact_words(["x.py", "--hf-token", "abc", "token=abc", "--n", "3"]) == [
        "x.py", "--hf-token", "***", "token=***", "--n", "3"]  # fmt: skip


def test_log_lines_and_tracebacks_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    setup(0, tmp_path / "log.txt")
    log = logging.getLogger("stillhouse")
    try:
        try:
            raise ValueError("at https://bob:hunter22@host/ with correct-horse-battery")
        except ValueError:
            log.exception("reading %s", "https://bob:hunter22@host/x")
    finally:
        setup(0)
    for text in ((tmp_path / "log.txt").read_text(), capsys.readouterr().err):
        assert "ValueError: at https://***@host/ with ***" in text
        assert "hunter22" not in text
        assert "correct-horse" not in text
