"""How often answers follow their own targets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor
from stethoscope.probes import Agreement, Classes


def read(**given):
    attached = Agreement().attach(nn.Identity())
    attached.arm(True, "train")
    return {key.name: float(value) for key, value in attached.read(given).items()}


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-100, 100))
def test_scale_and_offset_of_answers_do_not_matter(seed, scale, offset):
    made = torch.Generator().manual_seed(seed)
    answers, targets = torch.randn(2, 16, 3, generator=made)
    plain = read(outputs=answers, targets=targets)["answer/concordance"]
    assert read(outputs=scale * answers.double() + offset, targets=targets)["answer/concordance"] == pytest.approx(
        plain, abs=0.01
    )


def test_answers_that_follow_or_oppose_their_targets_lie_at_the_ends():
    targets = torch.randn(32, 5)
    assert read(outputs=3 * targets + 1, targets=targets)["answer/concordance"] == 1
    assert read(outputs=-targets, targets=targets)["answer/concordance"] == 0


@pytest.mark.parametrize("shape", [(4000, 32), (4000, 32, 6)])
def test_answers_of_no_relation_lie_in_the_middle(shape):
    torch.manual_seed(0)
    found = [
        read(outputs=torch.randn(32, *shape[2:]), targets=torch.randn(32, *shape[2:]))["answer/concordance"]
        for _ in range(100)
    ]
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.03)


def test_a_constant_answer_is_a_tie():
    assert read(outputs=torch.ones(8, 3), targets=torch.randn(8, 3))["answer/concordance"] == 0.5
    assert read(logits=torch.zeros(8, 5), targets=torch.arange(8) % 5)["answer/concordance"] == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(16,), (16, 7), (16, 4, 5)])
def test_scores_of_classes_are_found_on_either_axis_and_ignored_targets_left_out(shape):
    torch.manual_seed(0)
    targets = torch.randint(6, shape)
    scores = nn.functional.one_hot(targets, 6).float()
    targets[::3] = -100 if len(shape) == 1 else targets[::3]
    for logits in (scores, scores.movedim(-1, 1)):
        assert read(logits=logits, targets=targets)["answer/concordance"] == 1


def test_targets_that_are_all_alike_make_no_pairs():
    assert read(outputs=torch.randn(8), targets=torch.ones(8))["answer/pairs"] == 0
    assert read(outputs=torch.full((8,), torch.nan), targets=torch.randn(8))["answer/pairs"] == 0


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"outputs": torch.randn(8)},
        {"outputs": torch.randn(8, 3), "targets": torch.randn(8, 4)},
        {"outputs": torch.randn(3), "targets": torch.randn(3)},
        {"logits": torch.randn(3, 4), "targets": torch.arange(3)},
        {"outputs": torch.tensor(1.0), "targets": torch.tensor(1.0)},
    ],
)
def test_what_cannot_be_compared_is_left_alone(given):
    assert read(**given) == {}


def test_only_training_is_read():
    attached = Agreement().attach(nn.Identity())
    attached.arm(True, "val")
    assert not attached.read({"outputs": torch.randn(8), "targets": torch.randn(8)})


def in_rows(x):
    return torch.nested.nested_tensor(list(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("made", [torch.Tensor.to_sparse, in_rows], ids=["sparse", "nested"])
@pytest.mark.parametrize("which", ["logits", "targets"])
def test_answers_that_cannot_be_indexed_are_passed_over(made, which):
    given = {"logits": torch.randn(16, 4), "targets": torch.randint(4, (16,))}
    if which == "targets":
        given = {"logits": torch.randn(16, 4), "targets": torch.randn(16, 4)}
    given[which] = made(given[which])
    with Monitor(nn.Linear(2, 2), probes=[Agreement(), Classes()], every=1, strict=True) as monitor:
        monitor.step(**given)
    assert {f.code for f in monitor.findings} == {"probe-read-nothing"}
