from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.watches import ParameterHealth


def train(rates, *, trained):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    if trained:
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.3 * weight.abs().mean() * torch.randn_like(weight))
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip((net[0], net[2:]), rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(0)
    with Monitor(net, optimizer, watches=[ParameterHealth()], every=5, planned_steps=120, strict=True) as monitor:
        for _ in range(120):
            x = torch.randn(16, 8, generator=generator)
            loss = nn.functional.cross_entropy(net(x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return [f.code for f in monitor.findings]


@pytest.mark.parametrize(
    ("rates", "trained", "found"),
    [((3e-6, 3e-3), False, ["update-ratio-low"]), ((3e-6, 3e-3), True, []), ((3e-5, 3e-3), False, [])],
)
def test_rates_of_fresh_groups_a_thousand_times_apart_are_told(rates, trained, found):
    assert train(rates, trained=trained) == found
