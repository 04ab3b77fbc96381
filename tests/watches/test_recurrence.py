from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.watches import GradientHealth


class Net(nn.Module):
    def __init__(self, kind, taken):
        super().__init__()
        self.rnn, self.taken = kind(6, 8, batch_first=True, bidirectional=True), taken
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.taken(self.rnn(x)[0]))


def found(kind, taken):
    torch.manual_seed(0)
    net = Net(kind, taken)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    with Monitor(net, optimizer, watches=[GradientHealth()], every=5, strict=True) as monitor:
        for _ in range(30):
            x = torch.randn(8, 5, 6)
            loss = nn.functional.cross_entropy(net(x), x[:, 2, :3].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return {(f.code, f.module): set(f.evidence["modules"]) for f in monitor.findings}


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_directions_and_states_that_are_not_used_are_told(kind):
    half = lambda y: torch.cat([y[:, -1, :8], y[:, -1, :8]], -1)  # noqa: E731
    assert found(kind, half)["gradient-zero", "rnn"] == {"rnn.weight_hh_l0_reverse", "rnn.weight_ih_l0_reverse"}
    first = lambda y: y[:, 0]  # noqa: E731  # the backward direction has come to its end there
    assert found(kind, first)["gradient-zero", "rnn"] == {"rnn.weight_hh_l0"}
    assert found(kind, lambda y: y.mean(1)) == {}
