from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, probes, sinks
from stethoscope.testing import assert_no_sync


def counted(**given):
    memory = sinks.Memory()
    with Monitor(nn.Linear(1, 1), probes=[probes.Classes()], sinks=[memory], every=1, strict=True) as monitor:
        monitor.step(**given)
    found = [r for r in memory.records if r.name.startswith(("classes/", "tokens/"))]
    return {r.name: list(r.value.counts) for r in found if not r.name.endswith("/surprise")}


@pytest.mark.parametrize("shape", [(64,), (8, 8)])
def test_the_first_answers_of_a_training_are_compared_with_guessing_once(shape):
    torch.manual_seed(0)
    logits, targets = 5 * torch.randn(*shape, 7), torch.randint(7, shape)
    targets.view(-1)[0] = -100
    memory = sinks.Memory()
    with Monitor(nn.Linear(1, 1), probes=[probes.Classes()], sinks=[memory], every=1, strict=True) as monitor:
        for _ in range(3):
            monitor.step(logits=logits, targets=targets)
    expected = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten()) - torch.tensor(7.0).log()
    found = [(r.name, r.step, r.value) for r in memory.records if r.name.endswith("/surprise")]
    assert found == [
        (f"{'classes' if len(shape) == 1 else 'tokens'}/surprise", 0, pytest.approx(float(expected), rel=1e-5))
    ]


def test_answers_targets_and_hits_are_counted_per_class_and_ignored_labels_are_left_out():
    logits = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 3, 0], [0, 0, 3]])
    found = counted(logits=logits, targets=torch.tensor([0, 1, 2, -100]))
    assert found == {"classes/predicted": [1, 2, 0], "classes/target": [1, 1, 1], "classes/right": [1, 1, 0]}


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.randn(4, 6, 5000), torch.zeros(4, 6, dtype=torch.long)),  # a vocabulary
        (torch.randn(4, 1), torch.zeros(4)),
        (torch.randn(4, 5000), torch.zeros(4, dtype=torch.long)),
        (torch.randn(4, 5), torch.randn(4, 5)),
    ],
)
def test_what_is_no_classification_is_not_counted(logits, targets):
    assert counted(outputs=logits, targets=targets) == {}


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 3, 6)])
def test_classes_of_sequences_are_found_on_the_last_axis_or_the_second(shape):
    logits = torch.zeros(shape)
    (logits if shape[-1] == 3 else logits.movedim(1, -1))[..., 2] = 1.0
    targets = torch.tensor([2, 2, 2, 0, 1, -100]).repeat(4, 1)
    found = counted(logits=logits, targets=targets)
    assert found == {"tokens/predicted": [0, 0, 20], "tokens/target": [4, 4, 12], "tokens/right": [0, 0, 12]}


def test_answers_without_targets_are_counted_where_the_name_says_what_they_are():
    scores = torch.eye(3).repeat(2, 1, 1)
    assert counted(logits=scores) == {"tokens/predicted": [2, 2, 2]}
    assert counted(logits=scores, targets=torch.zeros(2, 9, dtype=torch.long)) == {"tokens/predicted": [2, 2, 2]}
    assert counted(outputs=scores) == {}


def test_nothing_waits_for_the_device():
    given = {"outputs": torch.randn(4, 3), "labels": torch.tensor([0, 1, 2, 1])}
    assert_no_sync(probes.Classes(), nn.Linear(3, 3), torch.randn(4, 3), given)
    assert_no_sync(probes.Classes(), nn.Linear(3, 3), torch.randn(4, 3), {"logits": torch.randn(4, 5, 3)})


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit_per_item_stands_for_two_classes(shape, kind):
    logits, labels = torch.tensor([2.0, -1.0, 0.5, -3.0]).view(shape), torch.tensor([1, 1, 0, 0]).to(kind)
    found = counted(logits=logits, targets=labels)
    assert found == {"classes/predicted": [2, 2], "classes/target": [2, 2], "classes/right": [1, 1]}


def test_a_mask_of_pixels_is_counted_as_tokens_and_measurements_not_at_all():
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 0] = 1.0
    assert counted(logits=mask - 0.5, targets=mask)["tokens/right"] == [28, 4]
    assert counted(logits=torch.randn(4), targets=torch.tensor([0.0, 1.0, 0.3, 1.0]))["classes/target"] == [0, 0]
    assert counted(logits=torch.randn(4, 5), targets=torch.ones(4, 5)) == {}  # five questions per item


def test_binary_targets_do_not_wait_for_the_device():
    given = {"logits": torch.randn(4), "labels": torch.tensor([0.0, 1.0, 1.0, 1.0])}
    assert_no_sync(probes.Classes(), nn.Linear(3, 3), torch.randn(4, 3), given)
