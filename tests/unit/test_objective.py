"""The objective: what each term is divided by, where it looks, how it moves with the step, which layers it compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from engine.config.terms import AnyTerm
from engine.data.collate import collate
from engine.errors import ConfigError
from engine.losses.hidden import layer_pairs
from engine.losses.layers import Shape
from engine.losses.objective import Objective, StepContext
from engine.schema import IGNORE, Answer, Batch, DenseTargets, Head, Sample
from tests import references

IDS, WIDTH, TEACHER_WIDTH, LAYERS, TEACHER_LAYERS = 50, 12, 20, 2, 4


def terms(*settings: dict[str, Any]) -> tuple[AnyTerm, ...]:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyTerm)
    return tuple(adapter.validate_python(each) for each in settings)


def make_objective(*settings: dict[str, Any], teacher_width: int = TEACHER_WIDTH, num_steps: int = 10) -> Objective:
    torch.manual_seed(5)
    return Objective(
        terms(*settings),
        num_steps=num_steps,
        num_ids=IDS,
        student=Shape(WIDTH, LAYERS),
        teacher=Shape(teacher_width, TEACHER_LAYERS),
    )


def make_batch(sequences: Sequence[int] = (0, 1, 2, 3), width: int = 8) -> Batch:
    """Sequences of 5 to 8 tokens; about half of the positions have a label. A sequence is always the same."""
    samples, ids, labels = [], [], []
    for number in sequences:
        rng = np.random.default_rng(number)
        length = 5 + number % 4
        token_ids = rng.integers(0, IDS, length)
        samples.append(Sample("shard", str(number), token_ids, np.array([length])))
        ids.append(token_ids)
        labels.append(np.where(rng.random(length) < 0.5, rng.integers(0, IDS, length), IGNORE))
    return collate(samples, (np.concatenate(ids), np.concatenate(labels)), pad_id=0, sequence_tokens=width)


class Model:
    """States and heads drawn for each sequence, the same in whichever micro-batch it comes."""

    def __init__(self, teacher_width: int = TEACHER_WIDTH) -> None:
        self.weight = torch.randn(IDS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.bias = torch.randn(IDS, generator=torch.Generator().manual_seed(2)).requires_grad_()
        self.teacher_width = teacher_width
        self.teacher_head = Head(torch.randn(IDS, teacher_width, generator=torch.Generator().manual_seed(3)), None)

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias)

    def states(self, sequences: Sequence[int]) -> tuple[Tensor, ...]:
        """[B, 8, WIDTH] for the embeddings and each layer."""
        return tuple(self._draw(sequences, layer, WIDTH).requires_grad_() for layer in range(LAYERS + 1))

    def targets(self, sequences: Sequence[int], rows: Tensor) -> DenseTargets:
        states = tuple(self._draw(sequences, 50 + n, self.teacher_width) for n in range(TEACHER_LAYERS + 1))
        return DenseTargets(states[-1].flatten(0, 1)[rows], self.teacher_head, states)

    @staticmethod
    def _draw(sequences: Sequence[int], layer: int, width: int) -> Tensor:
        seeds = [torch.Generator().manual_seed(1000 * layer + number) for number in sequences]
        return torch.stack([torch.randn(8, width, generator=generator) for generator in seeds])


def run(objective: Objective, model: Model, sequences: Sequence[int], context: StepContext) -> tuple[Tensor, Tensor]:
    batch = make_batch(sequences)
    states = model.states(sequences)
    targets = model.targets(sequences, objective.rows(batch))
    return objective(Answer(states[-1], hidden_states=states), model.head, batch, targets, context)


def whole(step: int = 0) -> StepContext:
    batch = make_batch()
    return StepContext(step, batch.num_labels, batch.num_tokens)


KL = {"kind": "forward_kl", "temperature": 2.0, "weight": 0.5}
CE = {"kind": "cross_entropy", "weight": 2.0}
EVERYTHING = (
    KL | {"restrict_to": "all"},
    {"kind": "reverse_kl", "weight": 0.3},
    CE,
    {"kind": "hidden_cosine", "layers": "last"},
    {"kind": "hidden_mse", "layers": "spread", "restrict_to": "masked", "weight": 0.7},
)


def test_a_term_is_its_sum_divided_by_the_steps_number_of_its_positions() -> None:
    """All real tokens and labelled positions in one objective, each with its own divisor."""
    objective, model = make_objective(*EVERYTHING), Model()
    loss, metrics = run(objective, model, (0, 1, 2, 3), whole())
    batch = make_batch()
    states, targets = model.states((0, 1, 2, 3)), model.targets((0, 1, 2, 3), batch.token_rows)
    labels = batch.labels.flatten()
    z = references.logits(states[-1].flatten(0, 1), model.head, IDS)
    z_teacher = references.logits(targets.hidden_states[-1].flatten(0, 1), model.teacher_head, IDS)
    log_q, log_p = (torch.log_softmax(x / 2, 1) for x in (z, z_teacher))
    kl = 4 * references.divergence("forward_kl", log_q, log_p, None)[batch.token_rows].mean()
    log_q, log_p = (torch.log_softmax(x, 1) for x in (z, z_teacher))
    reverse = references.divergence("reverse_kl", log_q, log_p, None)[batch.label_rows].mean()
    ce = F.cross_entropy(z, labels, ignore_index=IGNORE)
    cosine = hidden_value(objective, "3_0", states[2], targets.hidden_states[4], batch.token_rows, "cosine")
    mse = [
        hidden_value(objective, f"4_{n}", states[n + 1], targets.hidden_states[2 * n + 2], batch.label_rows, "mse")
        for n in range(2)
    ]
    values = torch.stack([kl, reverse, ce, cosine.double(), torch.stack(mse).mean().double()])
    torch.testing.assert_close(loss, (values @ torch.tensor([0.5, 0.3, 2.0, 1.0, 0.7]).double()).float())
    counts = torch.tensor([batch.num_tokens, batch.num_labels, batch.num_labels, batch.num_tokens, batch.num_labels])
    torch.testing.assert_close(metrics[:5], (values * counts).float())
    assert objective.over_tokens[:5] == [True, False, False, True, False]


def hidden_value(objective: Objective, name: str, ours: Tensor, theirs: Tensor, rows: Tensor, kind: str) -> Tensor:
    projected = objective.projections[name](ours.flatten(0, 1)[rows])
    wanted = theirs.flatten(0, 1)[rows]
    return F.mse_loss(projected, wanted) if kind == "mse" else (1 - F.cosine_similarity(projected, wanted)).mean()


@pytest.mark.parametrize("settings", [EVERYTHING, (KL, CE), ({"kind": "hidden_mse"},)], ids=["all", "logits", "hidden"])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(settings: tuple[dict[str, Any], ...]) -> None:
    """One micro-batch of four sequences, or three of them: the same gradient for head and projections."""
    found = []
    for cut in ([(0, 1, 2, 3)], [(2,), (0, 3), (1,)]):
        objective, model = make_objective(*settings), Model()
        for sequences in cut:
            run(objective, model, sequences, whole())[0].backward()
        leaves = [model.weight, model.bias, *objective.parameters()]
        found.append([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
    assert any((gradient != 0.0).any() for gradient in found[0])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_metrics_add_up_over_micro_batches() -> None:
    objective, model = make_objective(*EVERYTHING), Model()
    _, once = run(objective, model, (0, 1, 2, 3), whole())
    parts = [run(objective, model, sequences, whole())[1] for sequences in ((0, 2), (1, 3))]
    torch.testing.assert_close(parts[0] + parts[1], once)


def test_names_of_the_metrics() -> None:
    objective = make_objective(KL, CE, KL | {"temperature": 4.0}, {"kind": "hidden_mse"})
    names = ["forward_kl", "cross_entropy", "forward_kl_2", "hidden_mse"]
    metrics = ["student_nll", "teacher_nll", "kl_temperature_1", "agreement"]
    assert objective.metric_names == names + [f"{name}_weighted" for name in names] + metrics
    assert len(objective.over_tokens) == len(objective.metric_names)


def test_only_labelled_rows_are_asked_of_the_teacher_unless_a_term_needs_all() -> None:
    batch = make_batch()
    assert torch.equal(make_objective(KL, CE).rows(batch), batch.label_rows)
    assert torch.equal(make_objective(KL | {"restrict_to": "all"}, CE).rows(batch), batch.token_rows)


def test_weights_and_temperatures_move_with_the_step() -> None:
    ramp = {"start": 1.0, "end": 3.0, "from_step": 2, "to_step": 6}
    objective, model = make_objective(KL | {"temperature": ramp, "weight": {"start": 1.0, "end": 0.0}}), Model()
    for step, temperature, weight in ((0, 1.0, 1.0), (2, 1.0, 0.8), (4, 2.0, 0.6), (6, 3.0, 0.4), (9, 3.0, 0.1)):
        loss, _ = run(objective, model, (0, 1, 2, 3), whole(step))
        still = make_objective(KL | {"temperature": temperature, "weight": weight})
        expected, _ = run(still, model, (0, 1, 2, 3), whole(step))
        torch.testing.assert_close(loss, expected)
    cosine = make_objective(CE | {"weight": {"start": 0.0, "end": 2.0, "shape": "cosine"}})
    assert [cosine.weight(0, step) for step in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])


@pytest.mark.parametrize("kind", ["hidden_cosine", "hidden_mse"])
@pytest.mark.parametrize("teacher_width", [WIDTH, TEACHER_WIDTH])
def test_projections_only_where_widths_differ_and_they_train(kind: str, teacher_width: int) -> None:
    objective = make_objective({"kind": kind, "layers": "spread"}, CE, teacher_width=teacher_width)
    assert len(objective.projections) == (0 if teacher_width == WIDTH else LAYERS)
    loss, _ = run(objective, Model(teacher_width), (0, 1), whole())
    loss.backward()
    for parameter in objective.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0.0


def test_hidden_terms_alone_need_no_logits() -> None:
    """No logit term: the head's gradient is zero and that of the states is the hidden term's alone."""
    objective, model = make_objective({"kind": "hidden_mse"}, teacher_width=WIDTH), Model(WIDTH)
    batch, states = make_batch((0, 1)), model.states((0, 1))
    targets = model.targets((0, 1), objective.rows(batch))
    loss, _ = objective(
        Answer(states[-1], hidden_states=states), model.head, batch, targets, StepContext(0, 3, batch.num_tokens)
    )
    loss.backward()
    expected = torch.zeros(2 * 8, WIDTH)
    rows = batch.token_rows
    difference = (states[-1].detach() - targets.hidden_states[-1]).flatten(0, 1)[rows]
    expected[rows] = difference * 2 / WIDTH / batch.num_tokens
    assert states[-1].grad is not None
    torch.testing.assert_close(states[-1].grad.flatten(0, 1), expected)
    assert model.weight.grad is None or (model.weight.grad == 0.0).all()


def test_a_micro_batch_of_padding_gives_zero_and_zero_gradients() -> None:
    """All of its samples were damaged: every rank still makes the same calls."""
    objective, model = make_objective(*EVERYTHING), Model()
    batch, states = make_batch((0, 1)), model.states((0, 1))
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = dict.fromkeys(("label_rows", "token_rows"), empty)
    batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE), **nothing)
    targets = model.targets((0, 1), empty)
    loss, metrics = objective(Answer(states[-1], hidden_states=states), model.head, batch, targets, whole())
    loss.backward()
    assert loss == 0.0
    assert (metrics == 0.0).all()
    for leaf in (model.weight, model.bias, states[-1], *objective.parameters()):
        assert leaf.grad is None or (leaf.grad == 0.0).all()


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("last", 2, 4, ((2, 4),)),
        ("spread", 2, 4, ((1, 2), (2, 4))),
        ("spread", 6, 12, ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))),
        ("spread", 3, 4, ((1, 1), (2, 3), (3, 4))),
        ("spread", 1, 5, ((1, 5),)),
        (((0, 0), (2, 1)), 2, 4, ((0, 0), (2, 1))),
    ],
)
def test_layer_pairs(layers: Any, student: int, teacher: int, pairs: tuple[tuple[int, int], ...]) -> None:
    assert layer_pairs(layers, student, teacher) == pairs


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ((3, 1), "losses.1.layers: the student has no layer 3; 0 is its embeddings, 2 its last layer"),
        ((1, 5), "losses.1.layers: the teacher has no layer 5; 0 is its embeddings, 4 its last layer"),
        ((-1, 1), "losses.1.layers: the student has no layer -1; 0 is its embeddings, 2 its last layer"),
    ],
)
def test_a_layer_out_of_range_is_named(pair: tuple[int, int], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_objective(CE, {"kind": "hidden_mse", "layers": (pair,)})
    assert str(caught.value) == words


def test_batches_keep_their_fields_on_the_way_to_a_device() -> None:
    batch = make_batch()
    moved = batch.to(torch.device("cpu"))
    for field in fields(batch):
        one, other = getattr(batch, field.name), getattr(moved, field.name)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
