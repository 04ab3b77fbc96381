from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, presets, sinks

PRESETS = ["first_aid", "separation", "full"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_training_raises_no_alarm(name, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, **getattr(presets, name)(), every=20, strict=True) as monitor:
        for step in range(300):
            x = torch.randn(32, 8)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(x, loss=loss)
            if step % 100 == 99:
                model.eval()
                with monitor.phase("val"), torch.no_grad():
                    val = (model(x) - x.sum(1, keepdim=True)).square().mean()
                model.train()
                monitor.log({"loss": val})
    assert [str(finding) for finding in monitor.findings if finding.severity != "info"] == []


def test_the_separation_preset_reads_the_tensors_it_is_given():
    model, memory = nn.Conv1d(1, 2, 3, padding=1), sinks.Memory()
    with Monitor(model, **presets.separation(), sinks=[memory], strict=True) as monitor:
        mixture = torch.randn(4, 1, 800)
        monitor.step(loss=1.0, estimates=model(mixture), references=torch.randn(4, 2, 800), mixture=mixture)
    assert {"separation/out_cos", "separation/si_sdr_db", "separation/margin_db"} <= {r.name for r in memory.records}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_probes_and_watches_and_nothing_else(name):
    assert sorted(getattr(presets, name)()) == ["probes", "watches"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("every", [1, 3])
def test_nothing_is_recorded_twice(name, every):
    model, memory = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, **getattr(presets, name)(), every=every, sinks=[memory], strict=True) as monitor:
        for _ in range(4):
            loss = model(torch.randn(4, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    keys = [(r.name, r.step, r.module, r.call) for r in memory.records]
    assert len(keys) == len(set(keys))
