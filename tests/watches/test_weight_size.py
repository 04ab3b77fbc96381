from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.watches import ParameterHealth


@pytest.mark.parametrize("scale", [0.0, 1e-3])
def test_what_begins_at_zero_or_far_below_the_usual_may_grow_to_it(scale):
    torch.manual_seed(0)
    net = nn.Linear(8, 4)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(scale)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    with Monitor(net, optimizer, watches=[ParameterHealth()], every=5, strict=True) as monitor:
        for _ in range(200):
            x = torch.randn(32, 8)
            loss = nn.functional.cross_entropy(net(x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert "weight-norm-drift" not in [f.code for f in monitor.findings]
