"""Whether a logged tensor holds the graphs of several steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.watches import MetricSchema


def said(value, *, steps=12, every=1):
    """Severities of `metric-grad`; `value(losses)` is logged before the step is closed."""
    model, losses = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Monitor(model, optimizer=optimizer, watches=[MetricSchema()], sinks=[]) as monitor:
        for step in range(steps):
            loss = model(torch.randn(8, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss)
            if (step + 1) % every == 0:
                monitor.log({"mean_loss": value(losses)}, "train")
            monitor.step(loss=loss)
    return [finding.severity for finding in monitor.findings if finding.code == "metric-grad"]


@pytest.mark.parametrize(
    ("value", "every"),
    [
        (lambda losses: sum(losses) / len(losses), 1),
        (lambda losses: torch.stack(losses[-5:]).mean(), 1),
        (lambda losses: torch.stack(losses).mean(), 100),
    ],
    ids=["sum", "window", "epoch"],
)
def test_a_sum_or_mean_over_steps_with_their_graphs_warns(value, every):
    assert "warning" in said(value, steps=every * 2 if every > 1 else 12, every=every)


@pytest.mark.parametrize(
    "value",
    [
        lambda losses: losses[-1],
        lambda losses: losses[-min(2, len(losses))],
        lambda losses: losses[-1] + sum(each.detach() for each in losses),
        lambda losses: torch.stack([losses[-1] * i for i in range(100)]).mean(),
    ],
    ids=["its own", "of the step before", "others detached", "terms"],
)
def test_the_graph_of_one_step_is_an_info_however_often(value):
    assert said(value, steps=40) == ["info"]
