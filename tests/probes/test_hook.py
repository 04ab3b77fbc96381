"""All hooks that torch calls in the middle of a training: whatever fails behind one of them stays there."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import stethoscope
from stethoscope import Monitor, probes, sinks
from stethoscope.probes import _data_layers, _optimizers, _turns

sys.path.insert(0, str(Path(__file__).parents[1]))

from faulty import batch, hooks, make, same_weights_as_unobserved

ROOT = Path(stethoscope.__file__).parent
SOURCES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
CALLS = {
    f"{path.relative_to(ROOT)}:{kind.name}": method
    for path, tree in SOURCES.items()
    for kind in ast.walk(tree)
    if isinstance(kind, ast.ClassDef) and "Hook" in [base.id for base in kind.bases if isinstance(base, ast.Name)]
    for method in kind.body
    if isinstance(method, ast.FunctionDef) and method.name == "__call__"
}


def is_safe(statement):
    """Whether a statement catches what fails in it, or only compares and returns."""
    if isinstance(statement, ast.Try):
        return any(isinstance(each.type, ast.Name) and each.type.id == "Exception" for each in statement.handlers)
    if isinstance(statement, ast.If):
        return all(map(is_safe, [*statement.body, *statement.orelse]))
    if isinstance(statement, ast.Assign):
        return not any(isinstance(each, ast.Call | ast.Subscript) for each in ast.walk(statement))
    return isinstance(statement, ast.Return) and statement.value is None


@pytest.mark.parametrize("name", CALLS)
def test_what_a_hook_calls_is_called_in_a_try(name):
    assert all(map(is_safe, CALLS[name].body))


def test_the_search_finds_hooks_and_sees_one_that_lets_errors_pass():
    assert len(CALLS) >= 20
    (bad,) = ast.parse("def __call__(self, x):\n    if x: return\n    self.owner.called(x)").body
    assert [is_safe(each) for each in bad.body] == [True, False]


def fails(*_):
    raise MemoryError("injected")


def train(model, optimizers, monitor, steps=4):
    for step in range(steps):
        x = batch(step)
        loss = (model(x) - x).square().mean()
        optimizers[0].zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        monitor.step(loss=loss)


@pytest.mark.parametrize("method", ["begins", "arrives", "stepped"])
def test_two_optimizers_of_one_parameter_are_stepped_whatever_fails_behind_their_hooks(method, monkeypatch):
    weights = []
    for how in ("unobserved", "observed"):
        model, optimizer = make()
        both = [optimizer, torch.optim.SGD(model.head.parameters(), lr=0.01)]
        with Monitor(model, probes=[probes.Optimizers(every=1)] if how == "observed" else []) as monitor:
            if how == "observed":
                train(model, both, monitor, 2)  # who shares what is known after the first step
                monkeypatch.setattr(_turns.Turns, method, fails)
                train(model, both, monitor, 2)
            else:
                train(model, both, monitor, 2)
                train(model, both, monitor, 2)
        assert not hooks(model)
        weights.append(list(model.parameters()))
        said = [f.message for f in monitor.findings if f.code == "part-disabled"]
        assert len(said) == (how == "observed")
        assert all("Optimizers failed with MemoryError" in message for message in said)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_normalisation_runs_whatever_fails_before_it(monkeypatch):
    monkeypatch.setattr(_data_layers.DataLayers, "norm", fails)
    model, optimizer = make()
    with Monitor(model, probes=[probes.Inputs(every=1)]) as monitor:
        train(model, [optimizer], monitor)
    assert same_weights_as_unobserved(model, range(4))
    assert ["Inputs failed with MemoryError" in f.message for f in monitor.findings] == [True]


def test_a_probe_that_fails_where_the_monitor_is_stepped_in_a_hook_of_the_optimizer_stops_nothing(monkeypatch):
    monkeypatch.setattr(_optimizers.OptimizerHooks, "read", fails)
    model, optimizer = make()
    memory, after = sinks.Memory(), []
    # torch goes through the living dictionary of these hooks, from which that of the probe is to be taken
    with Monitor(model, optimizer, probes=[probes.Optimizers(every=1)], sinks=memory) as monitor:
        ours = [optimizer.register_step_post_hook(lambda *_: monitor.step())]
        ours.append(register_optimizer_step_post_hook(lambda *_: monitor.log({"a": 1.0})))
        ours.append(register_optimizer_step_post_hook(lambda *_: after.append(1)))
        for step in range(4):
            x = batch(step)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
    for handle in ours:
        handle.remove()
    assert len(after) == 4
    assert same_weights_as_unobserved(model, range(4))
    assert [f.code for f in monitor.findings] == ["part-disabled"]


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, *, scale):
        return self.inner(x) * scale


@pytest.mark.parametrize("guard", [None, "raise"])
def test_a_monitor_that_is_closed_while_torch_goes_through_the_hooks_of_a_call_stops_nothing(guard):
    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    every = {"probes": [probes.Activations(every=1), probes.Inputs(every=1)], "guard": guard}
    monitor = Monitor(model, optimizer, **every)
    model.register_forward_pre_hook(lambda *_: monitor.close(), prepend=True)
    model(torch.ones(2, 4), scale=2.0).sum().backward()
    optimizer.step()
    assert not model.inner._forward_hooks
    assert len(model._forward_pre_hooks) == 1


@pytest.mark.parametrize("end", ["close", "step"])
def test_a_monitor_that_is_closed_or_stepped_between_the_hooks_behind_a_call_stops_nothing(end):
    model = Root()
    flags = probes.Activations(statistics=("nonfinite",), every=2)
    monitor = Monitor(model, probes=[flags, probes.Activations(every=2), probes.Inputs(every=2)])
    for module in (model, model.inner):
        module.register_forward_hook(lambda *_: getattr(monitor, end)(), prepend=True)
    for _ in range(5):
        model(torch.ones(2, 4), scale=2.0).sum().backward()
    monitor.close()
    assert [len(module._forward_hooks) for module in model.modules()] == [1, 1]
    assert "part-disabled" not in [f.code for f in monitor.findings]
