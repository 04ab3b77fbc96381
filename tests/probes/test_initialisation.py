from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, probes, sinks


def looks(model, steps=1, every=1):
    memory = sinks.Memory()
    with Monitor(model, probes=[probes.Initialisation()], sinks=[memory], every=every, strict=True) as monitor:
        for _ in range(steps):
            monitor.step()
    return [r for r in memory.records if r.source == "probe"]


def value(model, name, module="0.weight"):
    return next(r.value for r in looks(model) if r.name == name and r.module == module)


LAYERS = {
    "linear": (lambda: nn.Linear(300, 200, bias=False), (64, 300)),
    "conv1d": (lambda: nn.Conv1d(64, 96, 5, bias=False), (8, 64, 400)),
    "conv2d in groups": (lambda: nn.Conv2d(64, 96, 3, groups=4, bias=False), (4, 64, 30, 30)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gain_is_the_factor_by_which_white_inputs_grow(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(shape)
    with torch.no_grad():
        grown = layer(x).square().mean().sqrt() / x.square().mean().sqrt()
    assert value(nn.Sequential(layer), "parameter/gain") == pytest.approx(float(grown), rel=0.05)


@pytest.mark.parametrize(
    ("init", "share"),
    [
        (lambda w: nn.init.constant_(w, 0.1), 1.0),
        (nn.init.zeros_, 0.0),  # no unit at all is not a copy
        (nn.init.xavier_uniform_, 0.0),
        (nn.init.orthogonal_, 0.0),
        (nn.init.eye_, 0.0),
        (lambda w: w.data.copy_(torch.randn(8, 12).repeat(2, 1)), 1.0),
        (lambda w: w.data[:4].copy_(torch.ones(4, 12)), 0.25),
    ],
)
def test_units_that_are_copies_are_counted(init, share):
    torch.manual_seed(0)
    layer = nn.Linear(12, 16)
    init(layer.weight)
    assert value(nn.Sequential(layer), "parameter/copies") == share


def test_kernels_of_one_channel_and_embeddings_are_no_copies():
    depthwise = nn.Conv1d(8, 8, 3, groups=8)
    nn.init.dirac_(depthwise.weight, groups=8)
    assert value(nn.Sequential(depthwise), "parameter/copies") == 0.0
    embedding = nn.Embedding(10, 4)
    nn.init.ones_(embedding.weight)
    found = looks(nn.Sequential(embedding, nn.Linear(4, 4)))
    assert {r.module for r in found if r.name == "parameter/copies"} == {"1.weight"}


def test_it_looks_five_times_and_first_before_the_first_step():
    model = nn.Sequential(nn.Linear(4, 4))
    memory = sinks.Memory()
    with Monitor(model, probes=[probes.Initialisation()], sinks=[memory], every=1) as monitor:
        for _ in range(8):
            with torch.no_grad():
                model[0].weight.mul_(100)
            monitor.step()
    gains = [r.value for r in memory.records if r.name == "parameter/gain"]
    assert len(gains) == 5
    assert gains[0] < 1 < gains[1]


def test_an_embedding_is_as_large_as_its_entries_and_a_tied_one_has_a_gain():
    table, head = nn.Embedding(200, 16), nn.Linear(16, 200, bias=False)
    nn.init.normal_(table.weight, std=3.0)
    assert value(nn.Sequential(table), "parameter/table_rms") == pytest.approx(3.0, rel=0.1)
    head.weight = table.weight
    assert "parameter/table_rms" not in {record.name for record in looks(nn.Sequential(table, head))}
    assert looks(nn.Sequential(nn.Embedding(4, 4)).requires_grad_(False)) == []
