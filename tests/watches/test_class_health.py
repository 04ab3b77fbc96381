from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from stethoscope import Monitor, Record
from stethoscope._record import Histogram
from stethoscope.testing import replay
from stethoscope.watches import ClassHealth


def train(shares, *, shuffled=False, steps=300, every=10, rate=0.05):
    torch.manual_seed(0)
    classes = len(shares)
    centres = torch.randn(classes, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    with Monitor(model, optimizer, watches=[ClassHealth()], every=every, strict=True) as monitor:
        for _ in range(steps):
            y = torch.multinomial(torch.tensor(shares), 64, replacement=True)
            x = centres[y] * 0.5 + 0.7 * torch.randn(64, 8)
            logits = model(torch.zeros_like(x) if shuffled else x)
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, logits=logits, targets=y)
    return [f.code for f in monitor.findings if f.severity != "info"]


@pytest.mark.parametrize("shares", [[1.0] * 5, [1.0, 0.5, 0.3, 0.3, 0.3]])
def test_balanced_and_mildly_unbalanced_classes_are_fine(shares):
    assert train(shares) == []


def test_a_model_without_its_input_answers_with_one_class():
    assert train([0.3, 0.2, 0.2, 0.2], shuffled=True, rate=0.01) == ["prediction-collapse"]


def test_a_rare_class_that_is_never_recognised():
    assert "class-imbalance" in train([0.5, 0.5, 0.5, 0.012], steps=400)


def test_one_class_that_most_items_are_of_is_no_collapse():
    assert "prediction-collapse" not in train([0.97, 0.03])


def observed(targets, answers=None, plan=None, group="classes", every=10, classes=5):
    """Records of a run: `targets(i)` and `answers(i)` are lists of classes of the i-th observed batch; a right answer where none are given."""
    if plan is not None:
        yield Record("plan/steps", plan, 0, source="step")
    for i in range(60):
        y = targets(i)
        given = y if answers is None else answers(i)
        hits = [a for a, b in zip(given, y, strict=True) if a == b]
        for name, values in (("predicted", given), ("target", y), ("right", hits)):
            counts = tuple(float(values.count(k)) for k in range(classes))
            yield Record(
                f"{group}/{name}", Histogram(tuple(map(float, range(classes + 1))), counts), i * every, kind="histogram"
            )


def drawn(shares, batch, seed):
    rng = random.Random(seed)
    return lambda i: rng.choices(range(len(shares)), shares, k=batch)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("run", [1, 7])
def test_batches_in_the_order_of_their_classes(seed, run):
    mixed = drawn([1.0] * 5, 32, seed)
    found = replay(ClassHealth(), observed(lambda i: [i // run % 5] * 32))
    assert [f.code for f in found] == ["class-imbalance"]
    assert "the data come in order" in found[0].message
    assert replay(ClassHealth(), observed(mixed)) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group", ["classes", "tokens"])
def test_targets_that_become_one_class(seed, group):
    mixed = drawn([1.0] * 5, 32, seed)
    found = replay(ClassHealth(), observed(lambda i: mixed(i) if i < 20 else [3] * 32, group=group))
    assert [f.code for f in found] == ["class-imbalance"]
    assert found[0].message == "All batches of late are of class 3."
    assert 200 < found[0].step <= 260


def test_targets_of_one_class_from_the_start():
    found = replay(ClassHealth(), observed(lambda i: [0] * 32, plan=600))
    assert [f.message for f in found] == ["All batches are of class 0."]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("batch", [4, 8, 32])
@pytest.mark.parametrize("rare", [0.02, 0.1, 0.3])
def test_unbalanced_classes_whose_rare_one_is_recognised_are_fine(rare, batch, seed):
    assert replay(ClassHealth(), observed(drawn([1 - rare, rare], batch, seed), plan=600)) == []


@pytest.mark.parametrize("seed", range(3))
def test_many_rare_classes_are_judged_together(seed):
    targets = drawn([0.01, 0.96, 0.01, 0.01, 0.01], 32, seed)
    found = replay(ClassHealth(), observed(targets, lambda i: [1] * 32, plan=600))
    assert {f.code for f in found} == {"class-imbalance"}
    assert found[0].step >= 150


def test_rare_tokens_are_usual():
    targets = drawn([0.02, 0.92, 0.02, 0.02, 0.02], 32, 0)
    assert replay(ClassHealth(), observed(targets, lambda i: [1] * 32, plan=600, group="tokens")) == []


@pytest.mark.parametrize(("until", "codes"), [(10, []), (35, ["prediction-collapse"])])
def test_blanks_alone_are_usual_at_first_and_a_collapse_in_half_of_the_run(until, codes):
    records = [Record("plan/steps", 600, 0, source="step")]
    for i in range(60):
        counts = (50.0, 0.0, 0.0) if i < until else (40.0, 5.0, 5.0)
        records.append(Record("tokens/predicted", Histogram((0.0, 1.0, 2.0, 3.0), counts), i * 10, kind="histogram"))
    assert [f.code for f in replay(ClassHealth(), records)] == codes


def test_one_answer_during_a_warm_up_is_no_collapse():
    targets = drawn([1.0] * 5, 32, 0)
    wrong = list(observed(targets, lambda i: [1] * 32 if i < 30 else targets(i), plan=600))
    rates = [Record("lr", min(1.0, (i + 1) / 30), i * 10, source="step") for i in range(60)]
    warm = [r for i in range(60) for r in (rates[i], *(w for w in wrong if w.step == i * 10))]
    assert "prediction-collapse" in [f.code for f in replay(ClassHealth(), wrong)]
    assert "prediction-collapse" not in [f.code for f in replay(ClassHealth(), warm)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("group", "shares", "code"),
    [
        ("classes", [0.6, 0.14, 0.13, 0.13], "prediction-collapse"),
        ("tokens", [0.6, 0.14, 0.13, 0.13], "prediction-collapse"),
        ("tokens", [0.93, 0.02, 0.02, 0.03], "class-imbalance"),
    ],
)
def test_a_model_that_says_what_most_targets_are_and_nothing_else(seed, group, shares, code):
    targets = drawn(shares, 320, seed)
    found = replay(ClassHealth(), observed(targets, lambda i: [0] * 320, plan=600, group=group))
    assert [f.code for f in found] == [code]
    assert found[0].message.startswith("100.0% of the answers are class 0")
    assert found[0].step >= 300
    learns = lambda i: [0] * 320 if i < 25 else targets(i)  # noqa: E731
    assert replay(ClassHealth(), observed(targets, learns, plan=600, group=group)) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("answered", [False, True])
def test_a_class_too_rare_for_ten_steps_that_is_never_answered(seed, answered):
    targets = drawn([0.495, 0.495, 0.01], 32, seed)
    seen = {i: targets(i) for i in range(60)}
    blind = lambda i: [c if answered else min(c, 1) for c in seen[i]]  # noqa: E731
    found = replay(ClassHealth(), observed(seen.get, blind, plan=600))
    assert [f.code for f in found] == ([] if answered else ["class-imbalance"])


def test_a_rare_class_is_told_once_however_many_of_it_lie_in_the_window():
    seen = {i: [0] * 60 + [1] * (4 if i % 20 < 10 else 0) for i in range(60)}
    found = replay(ClassHealth(), observed(seen.get, lambda i: [0] * len(seen[i]), plan=600))
    assert [f.code for f in found] == ["class-imbalance"]


@pytest.mark.parametrize(("comes", "codes"), [(300, []), (0, ["class-imbalance"])])
def test_a_class_that_a_curriculum_brings_is_new_before_it_is_rare(comes, codes):
    def step(at):
        """Class 2 has eight items of 108 a step from `comes` on, and is recognised after thirty steps; without a curriculum never."""
        third = 8.0 if at >= comes else 0.0
        right = third if comes and at >= comes + 30 else 0.0
        rows = {
            "predicted": (50.0, 50.0 + third - right, right),
            "target": (50.0, 50.0, third),
            "right": (50.0, 50.0, right),
        }
        for name, counts in rows.items():
            yield Record(f"classes/{name}", Histogram((0.0, 1.0, 2.0, 3.0), counts), at, kind="histogram")

    records = [Record("plan/steps", 600, 0, source="step"), *(each for at in range(0, 600, 10) for each in step(at))]
    watch = ClassHealth(imbalance=6.0)
    assert [found.code for found in replay(watch, records)] == codes


@pytest.mark.parametrize(
    ("padding", "slips", "others", "codes"),
    [
        (800.0, 0.0, 0.3, ["class-imbalance"]),
        (800.0, 20.0, 0.3, []),  # background with blurred edges
        (800.0, 0.0, 0.95, []),  # solved
        (200.0, 0.0, 0.3, []),  # a word that is frequent
    ],
)
def test_padding_that_is_scored_is_told_without_a_mistake(padding, slips, others, codes):
    rest = 1000 - padding
    counts = {
        "predicted": (padding + slips, rest - slips),
        "target": (padding, rest),
        "right": (padding, others * rest),
    }
    edges = (0.0, 1.0, 2.0)
    records = [
        Record(f"tokens/{name}", Histogram(edges, values), at, kind="histogram")
        for at in range(0, 80, 10)
        for name, values in counts.items()
    ]
    assert [f.code for f in replay(ClassHealth(), records)] == codes
