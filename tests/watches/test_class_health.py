from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor
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
