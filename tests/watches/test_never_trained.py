from __future__ import annotations

import torch
from torch import nn

from stethoscope import Monitor
from stethoscope.watches import ParameterHealth


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def train(net, held, *, steps=60, before=None):
    optimizer = torch.optim.Adam(held, lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    monitor = Monitor(net, optimizer, watches=[ParameterHealth()], every=5, planned_steps=steps, strict=True)
    with monitor:
        for step in range(steps):
            if before:
                before(step)
            x = torch.randn(16, 8, generator=generator)
            loss = nn.functional.cross_entropy(net(x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return [(f.code, f.severity, f.module) for f in monitor.findings]


FOUND = [("optimizer-frozen-parameters", "warning", "2")]


def test_a_random_layer_that_is_frozen_in_the_optimizer_is_told():
    net = model()
    net[2].requires_grad_(False)
    assert train(net, net.parameters()) == FOUND


def test_random_features_that_no_optimizer_holds_are_meant():
    net = model()
    net[2].requires_grad_(False)
    assert train(net, [p for p in net.parameters() if p.requires_grad]) == []


def test_a_backbone_that_was_trained_is_well_though_the_optimizer_holds_it():
    net = model()
    train(net, net.parameters())
    net[2].requires_grad_(False)
    net[4].reset_parameters()
    net.zero_grad()
    assert train(net, net.parameters()) == []


def test_one_layer_of_a_trained_backbone_may_look_as_drawn():
    net = model()
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight * torch.randn(32, 8).exp())
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    assert train(net, net.parameters()) == []


def test_layers_that_are_thawed_within_the_first_third_of_the_plan_are_well():
    net = model()
    net[2].requires_grad_(False)
    assert train(net, net.parameters(), before=lambda step: net[2].requires_grad_(step >= 15)) == []


def test_a_layer_that_was_trained_and_is_then_frozen_is_well():
    net = model()
    assert train(net, net.parameters(), before=lambda step: net[2].requires_grad_(step < 15)) == []


def test_steps_that_bfloat16_rounds_away_are_told_and_larger_ones_are_not():
    for rate, found in ((3e-6, True), (1e-2, False)):
        net = model().bfloat16()
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        generator = torch.Generator().manual_seed(0)
        with Monitor(net, optimizer, watches=[ParameterHealth()], every=5, strict=True) as monitor:
            for _ in range(60):
                x = torch.randn(16, 8, generator=generator)
                loss = nn.functional.cross_entropy(net(x.bfloat16()).float(), x[:, :4].argmax(1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.step(loss=loss)
        told = [f for f in monitor.findings if f.code == "parameter-unchanged"]
        assert bool(told) == found, [f.message for f in monitor.findings]
        assert not told or any("rounded away" in f.message or "not one bit" in f.message for f in told)


def test_values_that_are_rounded_stochastically_are_not_resting():
    net = model().bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    torch.manual_seed(1)
    with Monitor(net, optimizer, watches=[ParameterHealth()], every=5, strict=True) as monitor:
        for _ in range(60):
            loss = net(torch.randn(16, 8).bfloat16()).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # each step moves a tenth of the values by one digit
                for weight in net.parameters():
                    moved = torch.rand(weight.shape) < 0.1
                    weight.copy_(torch.where(moved, weight * (1 + 2**-7), weight))
            monitor.step(loss=loss)
    assert [f.code for f in monitor.findings if "rounded" in f.message] == []
