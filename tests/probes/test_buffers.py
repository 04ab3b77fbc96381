from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, probes, sinks
from stethoscope.watches import NonFinite


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
    )


def run(model, watches=(), every=5, steps=30, spoil=None):
    memory = sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(
        model, optimizer, probes=[probes.Buffers()], watches=watches, sinks=[memory], every=every, strict=True
    ) as monitor:
        for step in range(steps):
            x = torch.randn(16, 4)
            loss = model(x if spoil is None or step != 12 else spoil(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return memory.records, [(f.code, f.severity, f.module) for f in monitor.findings]


def spoilt(model, value):
    """After step 12 alone."""

    def forward(x):
        with torch.no_grad():
            model[1].running_var[3] = value
        return x

    return forward


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_statistics_that_one_batch_has_spoilt_are_told_while_the_loss_is_finite(value):
    model = net()
    _, found = run(model, [NonFinite()], spoil=spoilt(model, value))
    assert found == [("nonfinite-buffer", "error", "1")]


def test_absurd_statistics_are_a_warning():
    model = net()
    _, found = run(model, [NonFinite()], spoil=spoilt(model, 1e30))
    assert found == [("nonfinite-buffer", "warning", "1")]


def test_healthy_statistics_and_masks_of_minus_infinity_are_silent():
    model = net()
    model.register_buffer("mask", torch.full((3, 3), -torch.inf))
    model.register_buffer("best", torch.tensor(torch.inf))
    records, found = run(model, [NonFinite()])
    assert found == []
    assert {(r.name, r.value) for r in records if r.name.startswith("buffer/")} == {("buffer/count", 4.0)}


def test_a_model_without_normalisations_has_none_and_nothing_to_say():
    records, found = run(nn.Sequential(nn.Linear(4, 2)), [NonFinite()])
    assert found == []
    assert {r.value for r in records if r.name == "buffer/count"} == {0.0}


def test_only_observed_steps_are_read():
    records, _ = run(net(), every=10)
    assert [r.step for r in records if r.name == "buffer/count"] == [0, 10, 20]


def test_lazy_normalisations_are_read_once_they_have_a_shape():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    records, _ = run_lazy(model)
    assert [r.value for r in records if r.name == "buffer/count"][-1] == 2.0


def run_lazy(model):
    memory = sinks.Memory()
    with Monitor(model, probes=[probes.Buffers()], sinks=[memory], every=1, strict=True) as monitor:
        for _ in range(3):
            model(torch.randn(8, 4)).sum().backward()
            monitor.step()
    return memory.records, monitor.findings
