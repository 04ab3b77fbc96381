from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, probes, sinks
from stethoscope.probes._drawn import drawn

INITIALISERS = {
    "default": lambda w: None,
    "xavier uniform": nn.init.xavier_uniform_,
    "xavier normal": nn.init.xavier_normal_,
    "kaiming normal": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "transformer": lambda w: nn.init.normal_(w, std=0.02),
}


def trained(weight, steps=60):
    """The same weight after some steps towards a rule."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for _ in range(steps):
        x = torch.randn(32, weight.shape[1])
        optimizer.zero_grad()
        (layer(x) - x.roll(1, 1)[:, : weight.shape[0]]).square().mean().backward()
        optimizer.step()
    return layer.weight.detach()


@pytest.mark.parametrize("name", INITIALISERS)
def test_a_fresh_draw_is_told_from_what_was_trained(name):
    torch.manual_seed(0)
    weight = nn.Linear(40, 32).weight.detach()
    INITIALISERS[name](weight)
    assert drawn(weight) == 1
    assert drawn(trained(weight)) == 0


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(32, 32),
        torch.eye(32),
        torch.ones(32, 32),
        torch.linspace(0, 1, 1024).view(32, 32) ** 2,
        torch.randn(2, 3),
    ],
    ids=["zeros", "identity", "ones", "a curve", "too few"],
)
def test_what_was_computed_is_not_drawn(weight):
    assert drawn(weight) == 0


def test_the_first_look_tells_of_frozen_layers_too_and_of_layers_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GRU(16, 16)).requires_grad_(False)
    memory = sinks.Memory()
    with Monitor(model, probes=[probes.Initialisation()], sinks=[memory], every=1, strict=True) as monitor:
        for _ in range(3):
            monitor.step()
    found = [(r.step, r.module) for r in memory.records if r.name == "parameter/drawn"]
    assert found == [(0, "0.weight"), (0, "2.weight_ih_l0"), (0, "2.weight_hh_l0")]
