from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.watches import ActivationHealth, GradientHealth


class Block(nn.Module):
    def __init__(self, width, twice):
        super().__init__()
        self.norm, self.linear, self.twice = nn.LayerNorm(width), nn.Linear(width, width), twice

    def forward(self, x):
        return (2 if self.twice else 1) * x + self.linear(self.norm(x)).relu()


class Net(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = y = self.first(x)
        for block in self.blocks:
            y = block(y)
        return self.last(x + y)


def train(net, watch):
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    torch.manual_seed(1)
    with Monitor(net, optimizer, watches=[watch], every=5, strict=True) as monitor:
        for _ in range(30):
            x = torch.randn(16, 8)
            loss = nn.functional.cross_entropy(net(x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return [(f.code, f.module) for f in monitor.findings]


@pytest.mark.parametrize("twice", [True, False])
def test_a_signal_that_doubles_with_each_block_explodes_and_one_that_is_added_to_does_not(twice):
    torch.manual_seed(0)
    found = train(Net(Block(16, twice) for _ in range(14)), ActivationHealth())
    assert found == ([("activation-exploding", "blocks.0")] if twice else [])


@pytest.mark.parametrize(("norm", "activation"), [(nn.Identity, nn.Sigmoid), (nn.LayerNorm, nn.ReLU)])
def test_gradients_vanish_in_one_part_though_a_skip_connection_passes_it_by(norm, activation):
    torch.manual_seed(0)
    found = train(Net(nn.Sequential(nn.Linear(16, 16), norm(16), activation()) for _ in range(9)), GradientHealth())
    assert found == ([("gradient-vanishing", "blocks.0.0")] if activation is nn.Sigmoid else [])
