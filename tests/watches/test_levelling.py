from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.watches import ActivationHealth


class Attends(nn.Module):
    """Learned queries look at a memory."""

    def __init__(self, mix=lambda memory: memory):
        super().__init__()
        self.memory, self.norm, self.mix = nn.Linear(8, 16), nn.LayerNorm(16), mix
        self.queries, self.ask, self.head = nn.Parameter(torch.randn(3, 16)), nn.Linear(16, 16), nn.Linear(24, 4)

    def forward(self, x):
        memory = self.norm(self.memory(x))
        queries = self.ask(self.queries.expand(len(x), -1, -1))
        answers = (queries @ memory.transpose(1, 2)).softmax(-1) @ memory
        return self.head(torch.cat([answers.mean(1), x[:, 0]], -1))


class Pooled(nn.Module):
    """All of the batch in one."""

    def __init__(self, axes):
        super().__init__()
        self.first, self.norm, self.head, self.axes = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4), axes

    def forward(self, x):
        return self.head(self.norm(self.first(x).mean(self.axes))).expand(len(x), -1)


def train(net, steps=30):
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    torch.manual_seed(1)
    with Monitor(net, optimizer, watches=[ActivationHealth()], every=5, strict=True) as monitor:
        for _ in range(steps):
            x = torch.randn(12, 5, 8)
            loss = nn.functional.cross_entropy(net(x), x[:, 0, :4].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return [(f.code, f.module) for f in monitor.findings]


def test_a_layer_after_which_all_items_are_one_is_told_and_learned_queries_are_not():
    torch.manual_seed(0)
    assert train(Attends()) == []
    net = Attends()
    net.norm.register_forward_hook(lambda module, args, y: y.mean(0, keepdim=True).expand_as(y))
    assert train(net) == [("feature-constant", "norm")]


@pytest.mark.parametrize(("axes", "found"), [((0, 1), [("feature-constant", "norm")]), (1, [])])
def test_one_answer_for_the_whole_batch_is_told(axes, found):
    torch.manual_seed(0)
    assert train(Pooled(axes)) == found


@pytest.mark.parametrize(("bias", "found"), [(9.0, [("activation-saturated", "2")]), (-9.0, []), (0.0, [])])
def test_a_last_sigmoid_that_is_open_everywhere_is_told_and_one_that_is_shut_is_not(bias, found):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Sigmoid())
    nn.init.constant_(net[1].bias, bias)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    with Monitor(net, optimizer, watches=[ActivationHealth()], every=5, strict=True) as monitor:
        for _ in range(30):
            x = torch.rand(16, 8)
            loss = (net(x) * x - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert [(f.code, f.module) for f in monitor.findings] == found


@pytest.mark.parametrize(
    ("width", "dead", "found"),
    [(8, 0.5, []), (8, 0.75, ["info"]), (32, 0.5, ["info"]), (32, 0.85, ["info"]), (32, 1.0, ["warning"])],
)
def test_half_of_eight_units_may_be_dead_by_chance_and_what_is_left_of_many_is_enough(width, dead, found):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
    with torch.no_grad():
        net[0].bias[: int(dead * width)] -= 100
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    with Monitor(net, optimizer, watches=[ActivationHealth()], every=5, strict=True) as monitor:
        for _ in range(30):
            loss = net(torch.randn(16, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    assert [f.severity for f in monitor.findings if f.code == "dead-units"] == found


def test_keys_that_a_mask_hides_from_a_softmax_are_no_dead_units():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.softmax, self.head = nn.Linear(8, 1), nn.Softmax(-1), nn.Linear(8, 4)

        def forward(self, x):
            scores = self.score(x).squeeze(-1).masked_fill(torch.arange(x.shape[1]) > 1, -torch.inf)
            return self.head((self.softmax(scores).unsqueeze(-1) * x).sum(1))

    assert train(Masked()) == []
