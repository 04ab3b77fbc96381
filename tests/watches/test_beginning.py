from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.watches import ClassHealth, LossInput, ParameterHealth


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6)
    )


def first_step(net, scale=1.0):
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    with Monitor(
        net, optimizer, watches=[ParameterHealth(), ClassHealth(), LossInput()], every=5, strict=True
    ) as monitor:
        for _ in range(3):
            x = torch.randn(64, 8)
            logits, targets = net(x), x[:, :6].argmax(1)
            logits = logits if scale == 1 else scale * logits
            loss = nn.functional.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, logits=logits, targets=targets)
    return [(f.code, f.module) for f in monitor.findings]


def counts_as_biases(net):
    net[-1].bias.data = torch.tensor([90.0, 40, 30, 20, 10, 5])


def scores_too_large(net):
    for i in (0, 2, 4):
        nn.init.kaiming_normal_(net[i].weight)
    net[-1].weight.data *= 60


@pytest.mark.parametrize("spoil", [counts_as_biases, scores_too_large])
def test_a_fresh_classifier_that_is_sure_of_something_is_told_with_its_head(spoil):
    net = model()
    spoil(net)
    assert first_step(net) == [("poor-initialisation", "6")]


def test_chance_is_a_good_beginning():
    assert first_step(model()) == []


def test_scores_that_are_scaled_after_the_last_layer_are_meant():
    assert first_step(model(), scale=60.0) == []  # cosines times a scale, with a margin


def test_what_was_trained_for_other_labels_may_be_sure_of_them():
    net = model()
    scores_too_large(net)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(1 + 0.5 * torch.randn_like(weight))
    assert ("poor-initialisation", "6") not in first_step(net)


@pytest.mark.parametrize(("layers", "found"), [((0, 2), [("poor-initialisation", "0")]), ((6,), []), ((2,), [])])
def test_layers_that_leave_nothing_of_the_input_are_told_and_single_small_ones_are_not(layers, found):
    net = model()
    for i in layers:
        nn.init.normal_(net[i].weight, std=1e-4)
        nn.init.zeros_(net[i].bias)
    assert [each for each in first_step(net) if each[0] == "poor-initialisation"] == found
