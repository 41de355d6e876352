from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine.config.following import TrackingSection
from engine.errors import CheckpointError
from engine.report import REPORT, RESULTS, ModelResult, Prediction, Results, Word, quantities, write_report
from engine.report.series import MAX_POINTS, series, step_seconds
from engine.report.verdict import tiles, verdict
from engine.tracking import METRICS, Tracker

EVIL = '<script>alert("x")</script><img src=http://example.org/a.png onerror=alert(1)>'
CHART_TITLES = (
    "Objective",
    "Term forward_kl",
    "Term cross_entropy",
    "Held-out loss",
    "Agreement with the teacher",
    "KL(teacher ‖ student) at temperature 1",
    "Throughput",
    "Model FLOPs utilisation",
    "Peak memory",
    "Learning rate",
    "Gradient norm",
    "Loss scale",
)


def make_results(word: str = " writing", name: str = "demo") -> Results:
    def guesses(*probabilities: float) -> tuple[Word, ...]:
        return tuple(Word(text, p) for text, p in zip((word, " reading", "\n"), probabilities))

    return Results(
        models=(
            ModelResult("big", "teacher", 12_480_000, 49_920_000, 3.936, 51.2, 1.0, 0.0231, 21_900.0),
            ModelResult("twin", "control", 6_710_000, 26_840_000, 4.412, 82.4, 0.481, 0.0122, 41_500.0),
            ModelResult(name, "student", 6_710_000, 26_840_000, 4.152, 63.6, 0.602, 0.0122, 41_600.0),
        ),
        predictions=(
            Prediction(
                "opened for ", word.strip(), ", and then", {"big": guesses(0.52, 0.31), name: guesses(0.3, 0.2)}
            ),
        ),
        origins=(("embeddings", "teacher's embeddings"), ("layer 1", "teacher's layer 2")),
        num_heldout_tokens=131_072,
    )


def train(folder: Path, first_step: int, last_step: int) -> Tracker:
    tracker = Tracker(folder, TrackingSection(), "demo", {}, first_step)
    for step in range(first_step + 10, last_step + 1, 10):
        record = {
            "loss/objective": 9.0 - step / 100,
            "loss/forward_kl": 2.0 - step / 400,
            "loss/forward_kl_weighted": 4.0 - step / 200,
            "loss/cross_entropy": 5.0 - step / 200,
            "loss/cross_entropy_weighted": 5.0 - step / 200,
            "kl/temperature_1": 1.0,
            "agreement/top1": step / 500,
            "train/grad_norm": math.inf if step == 10 else 1.5,
            "train/learning_rate": 1e-4,
            "train/loss_scale": 65536.0 if step < 100 else 32768.0,
            "train/skipped_steps": 1.0,
            "throughput/tokens_per_second": 12_000.0,
            "throughput/mfu": 0.4,
            "seconds/data": 0.01,
            "seconds/teacher": 0.1,
            "seconds/student": 0.3,
            "seconds/optimizer": 0.05,
            "memory/peak_bytes": 1.5e9,
            "data/bad_samples": 2.0,
            "time/elapsed_seconds": 0.5 * step,
        }
        tracker.record(step, record)
        if step % 50 == 0:
            tracker.record(
                step,
                {
                    "eval/student_loss": 4.6,
                    "eval/student_perplexity": 99.5,
                    "eval/teacher_loss": 3.936,
                    "eval/teacher_perplexity": 51.2,
                },
            )
            tracker.record(step, {"seconds/checkpoint_stall": 0.25})
    return tracker


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run killed at step 140, resumed from 100 and completed at 200."""
    folder = tmp_path / "demo"
    train(folder, 0, 140)
    train(folder, 100, 200).close("completed")
    (folder / "config.yaml").write_text("run: {name: demo, num_steps: 200}\nstudent: {config: my<odd>&name}\n")
    (folder / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "environment.json").write_text('{"versions": {"torch": "2.13.0"}, "devices": ["cpu", "cpu"]}')
    return folder


class Page(HTMLParser):
    """What a browser would see: tags, attributes and text, and whether every element is closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open_tags: list[str] = []
        self.feed(self.html)
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def num_tags(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


def test_full_run_shows_everything(finished):
    path = write_report(finished, results=make_results())
    page = Page(path)
    assert path == finished / REPORT
    assert page.num_tags("figure") == len(CHART_TITLES)
    for title in CHART_TITLES:
        assert title in page.text
    for expected in (
        "completed at step 200 of 200",
        "1.24× the teacher's",
        "stays at 82.4",
        "131,072 predicted tokens of held-out text",
        "1 (at step 100)",
        "train/grad_norm",
        "4; training waited 250",
        "teacher's layer 2",
        "my<odd>&name",
        "versions.torch",
        "cpu cpu",
    ):
        assert expected in page.text, expected
    assert "absent" not in [attributes.get("class") for _, attributes in page.tags]


def test_every_chart_names_its_axes(finished):
    page = Page(write_report(finished, results=make_results()))
    for svg in re.findall(r"<figure>.*?</figure>", page.html, re.DOTALL):
        labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
        assert "step" in labels
        assert any(re.search(r"nats|token|share|word|device|rate|norm|factor|loss", label) for label in labels), labels


def test_stopped_run_without_results_shows_what_there_is_and_says_what_is_not(tmp_path):
    train(tmp_path / "demo", 0, 70).close("stopped")
    (tmp_path / "demo" / "environment.json").write_text('{"origins": [["layer 1", "layer 7 of the teacher"]]}')
    page = Page(write_report(tmp_path / "demo"))
    assert "layer 7 of the teacher" in page.text
    assert "stopped on request at step 70" in page.text
    assert "held-out perplexity was 99.5. The teacher's is 51.2" in page.text
    assert "The models were not compared" in page.text
    assert "No predictions were kept" in page.text
    assert page.num_tags("figure") == len(CHART_TITLES) - 1, "the loss scale never changed"


@pytest.mark.parametrize("name", ["config.yaml", "ds_config.json", "environment.json"])
@pytest.mark.parametrize("content", [b"", b"[1, {", b"[1]", b"\xff\xfe", b'{"origins": 3}'])
def test_damaged_file_does_not_cost_the_report(name, content, tmp_path):
    Tracker(tmp_path, TrackingSection(), "demo", {}).close("stopped")
    (tmp_path / name).write_bytes(content)
    assert "stopped on request at step 0" in Page(write_report(tmp_path)).text


def test_killed_run_is_not_called_complete(tmp_path):
    train(tmp_path / "demo", 0, 70)
    assert "at step 70; still running, or killed" in Page(write_report(tmp_path / "demo")).text


def test_folder_without_any_file_gives_a_page_that_says_so(tmp_path):
    page = Page(write_report(tmp_path))
    classes = [attributes.get("class") for _, attributes in page.tags]
    assert page.num_tags("figure") == 0
    assert classes.count("absent") == 7
    assert "Nothing was recorded yet" in page.text


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss/objective": 5.0, "memory/peak_bytes": 0.0},
        {"loss/objective": math.nan, "train/grad_norm": math.inf, "seconds/data": 0.0},
        {"loss/objective": -5.0, "throughput/tokens_per_second": 1e-12},
    ],
)
@pytest.mark.parametrize("steps", [[0], [10], [1, 2, 3]])
@pytest.mark.filterwarnings("error")
def test_odd_values_still_give_a_page(steps, metrics, tmp_path):
    tracker = Tracker(tmp_path, TrackingSection(), "demo", {})
    for step in steps:
        tracker.record(step, metrics)
    tracker.close("failed")
    assert f"failed at step {steps[-1]}" in Page(write_report(tmp_path)).text


def test_text_from_data_stays_text(finished):
    results = make_results(word=EVIL, name=EVIL)
    (finished / "config.yaml").write_text(f"run: '{EVIL}'\n")
    (finished / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    with (finished / METRICS).open("a") as file:
        file.write(
            json.dumps({"step": 210, f"loss/{EVIL}": 1.0, f"loss/{EVIL}_weighted": 1.0, "nonfinite": [EVIL]}) + "\n"
        )
    page = Page(write_report(finished, results=results))
    assert page.num_tags("script") == page.num_tags("img") == 0
    assert page.text.count(EVIL) >= 9


def test_page_asks_nothing_of_a_network(finished):
    page = Page(write_report(finished, results=make_results()))
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,")), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import|http-equiv=.refresh", page.html)
    assert "http://" not in page.html
    assert "https://" not in page.html
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_amounts_are_drawn_from_zero(finished):
    """Throughput hardly moves, so an axis that fits the data alone would show noise as if it were something."""
    html = write_report(finished).read_text()
    for title, bottom in (("Throughput", "0"), ("Peak memory", "0 B"), ("Agreement with the teacher", "0 %")):
        (figure,) = re.findall(rf"<figcaption>{title}</figcaption>.*?</figure>", html, re.DOTALL)
        labels = re.findall(r"<text[^>]*>([^<]*)</text>", figure.replace(quantities.THIN_SPACE, " "))
        assert bottom in labels[labels.index("step") :], labels


def test_charts_wear_the_colours_of_the_page_and_share_no_ids(finished):
    html = write_report(finished, results=make_results()).read_text()
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert {"--series-0", "--series-2", "--muted", "--rule"} <= used
    for theme in html.split("prefers-color-scheme: dark"):
        assert used <= set(re.findall(r"(--[\w-]+):", theme))
    assert not re.search(r"#0[ef]000", html), "a stand-in colour was left"
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_report_can_be_made_again_from_the_folder(finished):
    first = write_report(finished, results=make_results()).read_text()
    again = write_report(finished).read_text()

    def undated(html: str) -> str:
        return re.sub(r"Made by Stillhouse.*", "", html)

    assert undated(first) == undated(again)
    assert Results.load(finished) == make_results()


def test_results_that_are_not_finite_are_not_measured(tmp_path):
    Results((ModelResult("demo", "student", 1, 4, loss=math.nan, perplexity=math.inf),)).save(tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded is not None
    assert (loaded.models[0].loss, loaded.models[0].perplexity) == (None, None)
    assert quantities.MISSING in Page(write_report(tmp_path)).text


@pytest.mark.parametrize("text", ["{", "[]", '{"models": [{"nickname": "x"}]}'])
def test_damaged_results_are_named(text, tmp_path):
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(CheckpointError, match=r"results\.json"):
        write_report(tmp_path)


def test_earlier_report_survives_a_full_disk(finished, monkeypatch):
    before = write_report(finished).read_text()

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CheckpointError, match=r"report\.html: No space left"):
        write_report(finished)
    assert (finished / REPORT).read_text() == before


def test_verdict_and_tiles_are_right_and_do_not_flatter():
    figures = {tile.name: tile.figure.replace(quantities.THIN_SPACE, " ") for tile in tiles(make_results())}
    assert figures == {
        "Perplexity": "63.6",
        "Agreement": "60.2 %",
        "Size": "53.8 %",
        "Speed": "1.89×",
        "Gap closed": "54.6 %",
    }
    teacher, control, student = make_results().models
    worse = Results((teacher, student, ModelResult(**{**vars(control), "perplexity": 60.0, "loss": 4.1})))
    assert "trained without a teacher does no worse: 60.0" in verdict(worse, [])
    assert "Gap closed" in {tile.name for tile in tiles(worse)}
    alone = Results((student,))
    assert verdict(alone, []) == "The student reaches a held-out perplexity of 63.6."
    assert [tile.name for tile in tiles(alone)] == ["Perplexity", "Agreement"]


def test_where_the_time_goes():
    records = [
        {
            "step": step,
            "seconds/data": 9.0 if step == 10 else 0.1,
            "seconds/student": 0.3,
            "time/elapsed_seconds": 0.5 * step,
        }
        for step in (10, 20, 30)
    ]
    assert step_seconds(records) == pytest.approx({"data": 0.1, "student": 0.3, "rest": 0.1})
    assert step_seconds([{"step": 1}]) == {}


def test_long_series_are_merged_without_losing_their_extremes():
    records = [{"step": step, "a": float(step % 10)} for step in range(1, 100_001)] + [{"step": 100_001, "a": 99.0}]
    curve = series(records, "a")
    assert len(curve) == MAX_POINTS
    assert curve.merged
    assert (curve.high.max(), curve.low.min()) == (99.0, 0.0)
    assert curve.values[:-1] == pytest.approx(4.5)
    assert (curve.steps[1:] > curve.steps[:-1]).all()
    assert curve.steps[-1] == 100_001
    assert len(series(records, "b")) == 0


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (quantities.number(1234.5), "1,234"),
        (quantities.number(0.01234), "0.0123"),
        (quantities.number(3.1e-7), "3.10e-07"),
        (quantities.number(math.nan), "–"),
        (quantities.count(99_999), "99,999"),
        (quantities.count(6_710_000), "6.71 M"),
        (quantities.count(999_999_999), "1.00 G"),
        (quantities.size(26_840_000), "26.8 MB"),
        (quantities.duration(0.0122), "12.2 ms"),
        (quantities.duration(75), "1 min 15 s"),
        (quantities.duration(7325), "2 h 2 min"),
        (quantities.tick(2.5e-4), "2.5e-4"),
        (quantities.tick(12_500), "12,500"),
        (quantities.share(0.6021), "60.2 %"),
    ],
)
def test_numbers_are_short_and_carry_units(shown, expected):
    assert shown.replace(quantities.THIN_SPACE, " ") == expected
