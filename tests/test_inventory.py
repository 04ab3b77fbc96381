from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from stethoscope import Monitor, presets, sinks
from stethoscope.probes import Activations

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of the compiler


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def told_after(change, model=None, steps=101, at=3):
    """Findings of a training during which the model is changed."""
    model, memory = model or make(), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, probes=[Activations()], sinks=[memory], strict=True) as monitor:
        for step in range(steps):
            if step == at:
                change(model)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            like = next(model.parameters())
            loss = model(torch.randn(4, 6).to(like)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return [each for each in memory.findings if each.code == "model-changed"]


def replace(model):
    model[0] = nn.Linear(6, 8)


@pytest.mark.parametrize(
    ("change", "added", "removed"),
    [
        (lambda model: model.append(nn.Linear(2, 2)), ["3.weight", "3.bias"], []),
        (replace, ["0.weight", "0.bias"], ["0.weight", "0.bias"]),
        (lambda model: model.__delitem__(2), [], ["2.weight", "2.bias"]),
        (
            lambda model: weight_norm(model[0]),
            ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
            ["0.weight"],
        ),
    ],
    ids=["added", "replaced", "removed", "weight_norm"],
)
def test_a_model_that_changes_while_it_is_observed_is_told_once_with_names(change, added, removed):
    (finding,) = told_after(change)
    assert (finding.severity, finding.step) == ("warning", 50)
    assert finding.evidence == {"added": added, "removed": removed}
    assert finding.module == (added or removed)[0].rpartition(".")[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        lambda model: model.double(),
        lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
        lambda model: model.requires_grad_(False)[0].requires_grad_(True),
        lambda model: model.append(nn.ReLU()),
        lambda model: model[0].compile(backend="eager"),
        lambda model: setattr(model, "2", torch.compile(model[2], backend="eager")),
    ],
    ids=["nothing", "moved", "pruned", "frozen", "activation", "compiled in place", "compiled"],
)
def test_what_leaves_the_parameters_the_same_is_no_change(change):
    assert not told_after(change, steps=52)


def test_lazy_parameters_that_get_their_shape_are_no_change():
    assert not told_after(lambda _: None, nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(2)), steps=52)


def test_a_second_monitor_goes_on_where_the_first_one_ends():
    model, memory = make(), sinks.Memory()
    first = Monitor(model, **presets.first_aid(), every=2, sinks=[memory], strict=True)
    with first:
        for _ in range(3):
            model(torch.randn(4, 6)).sum().backward()
            first.step()
        state = first.state_dict()
    model.append(nn.Linear(2, 2))
    with Monitor(model, **presets.first_aid(), every=2, sinks=[memory], strict=True) as second:
        second.load_state_dict(state)
        for _ in range(3):
            model(torch.randn(4, 6)).sum().backward()
            second.step()
    seen = {(r.step, r.module) for r in memory.records if r.name == "activation/rms"}
    assert {step for step, module in seen if module == "0"} == {0, 2, 4}
    assert {step for step, module in seen if module == "3"} == {4}
