from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, sinks
from stethoscope.probes import Gradients, Parameters
from stethoscope.probes._parameters import KNOWN


def run(model, steps, probe=None):
    memory = sinks.Memory()
    with Monitor(model, probes=[probe or Parameters()], sinks=[memory], every=1, strict=True) as monitor:
        for step in steps:
            step(model)
            monitor.step()
    return memory.records


def values(records, name, step=0):
    return {record.module: record.value for record in records if record.name == name and record.step == step}


@torch.no_grad()
def scale_first(model):
    model(torch.ones(2, 4))
    model[0].weight.mul_(1.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_update_ratio_and_unchanged(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 1)).to(dtype)

    @torch.no_grad()
    def step(model):
        model[0].weight.mul_(1.25)

    records = run(model, [step])
    ratios = values(records, "parameter/update_ratio")
    assert ratios.pop("0.weight") == pytest.approx(0.2, rel=0.02)  # 0.25 / 1.25
    assert set(ratios.values()) == {0.0}
    unchanged = {"0.weight": 0.0, "0.bias": 1.0, "1.weight": 1.0, "1.bias": 1.0}
    assert values(records, "parameter/unchanged") == unchanged
    norms = {name: p.double().norm().item() for name, p in model.named_parameters()}
    assert values(records, "parameter/norm") == pytest.approx(norms, rel=1e-4)


def test_one_changed_row_of_a_large_embedding_is_a_change():
    model = nn.Embedding(5000, 64)

    @torch.no_grad()
    def step(model):
        model.weight[4321] += 1e-3

    assert values(run(model, [step]), "parameter/unchanged") == {"weight": 0.0}


def test_a_weight_that_starts_at_zero_has_an_update_ratio_of_one():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.bias)

    @torch.no_grad()
    def step(model):
        model.bias += 1.0

    assert values(run(model, [step]), "parameter/update_ratio")["bias"] == 1.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("write", ["data", "in place", "optimizer"])
def test_a_bad_weight_is_seen_when_the_next_forward_begins(bad, write):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    probe = Parameters(("nonfinite",))

    def step(model):
        if write == "data":
            model[1].bias.data[2] = bad
        elif write == "in place":
            with torch.no_grad():
                model[1].bias[2] = bad
        model(torch.ones(3, 4))
        if write == "optimizer":
            model[1].bias.grad = torch.tensor([0.0, 0.0, bad, 0.0])
            torch.optim.SGD([model[1].bias], lr=1.0).step()

    records = run(model, [step, step], probe)
    first = 1 if write == "optimizer" else 0
    assert values(records, "parameter/nonfinite", 0) == ({"1.bias": 1.0} if first == 0 else {})
    assert values(records, "parameter/nonfinite", 1) == {"1.bias": 1.0}


def test_a_model_without_forward_is_checked_as_well():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])

        def encode(self, x):
            return self.blocks[0](x)

    model = Model()
    model.blocks[0].weight.data.fill_(torch.nan)
    records = run(model, [lambda model: model.encode(torch.ones(3, 2))], Parameters(("nonfinite",)))
    assert values(records, "parameter/nonfinite") == {"blocks.0.weight": 1.0}


def test_a_model_that_moves_to_another_dtype_while_observed():
    model = nn.Linear(4, 4)
    records = run(model, [lambda model: model.double(), lambda model: model(torch.ones(2, 4).double())])
    assert set(values(records, "parameter/norm", 1)) == {"weight", "bias"}


def test_complex_lazy_and_scalar_parameters():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(2.0))
            self.filter = nn.Parameter(torch.tensor([3 + 4j]))
            self.lazy = nn.LazyLinear(2)

    records = run(Odd(), [lambda model: None])
    assert values(records, "parameter/norm") == {"gain": 2.0, "filter": 5.0}


@pytest.mark.parametrize("statistics", [("nonfinite",), KNOWN])
def test_channels_last_and_several_of_one_shape(statistics):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
    model[1].weight.data[3, 2, 1, 0] = torch.nan
    memory = sinks.Memory()
    with Monitor(model, probes=[Parameters(statistics=statistics, every=1)], sinks=[memory], strict=True) as monitor:
        model(torch.randn(2, 8, 9, 9))
        monitor.step()
    assert [r.module for r in memory.records if r.name == "parameter/nonfinite"] == ["1.weight"]


def test_a_part_that_moves_and_a_lazy_part_are_read():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4), nn.Linear(4, 1))
    memory = sinks.Memory()
    probes = [Parameters(every=1), Gradients(every=1)]
    with Monitor(model, probes=probes, sinks=[memory], strict=True) as monitor:
        for step in range(4):
            if step == 2:
                model[1].double()
            hidden = model[1](model[0](torch.randn(3, 4)).to(torch.float64 if step >= 2 else torch.float32))
            loss = model[2](hidden.float()).sum()
            loss.backward()
            monitor.step(loss=loss)
    for name in ("parameter/norm", "gradient/norm"):
        last = {r.module: r.value for r in memory.records if r.step == 3 and r.name == name}
        assert {"0.weight", "1.weight", "2.weight"} <= set(last)
    assert last["1.weight"] == pytest.approx(model[1].weight.grad.norm().item())


@pytest.mark.parametrize(("factor", "expected"), [(1.1, 1.0), (0.9, -1.0)])
def test_steps_along_the_weights_are_told_from_steps_across(factor, expected):
    def outward(change):
        torch.manual_seed(0)
        model, memory = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), sinks.Memory()
        with Monitor(model, probes=[Parameters()], sinks=[memory], every=1, strict=True) as monitor:
            model(torch.randn(4, 64))
            with torch.no_grad():
                for parameter in model.parameters():
                    change(parameter)
            monitor.step()
        return next(record.value for record in memory.records if record.name == "parameter/outward")

    assert outward(lambda p: p.mul_(factor)) == pytest.approx(expected, abs=1e-3)
    assert abs(outward(lambda p: p.add_(1e-3 * torch.randn_like(p)))) < 0.2
