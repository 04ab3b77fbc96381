"""What every probe, watch and sink of the package must do, found by looking into the packages."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import json
import pickle
import pkgutil
from dataclasses import is_dataclass, replace

import pytest
import torch
from torch import nn

import stethoscope
from stethoscope import probes, sinks, watches
from stethoscope._protocols import Attachment, Probe, Run, Sink, Watch
from stethoscope.testing import assert_no_sync


def classes(package, method):
    return [each for _, each in sorted(vars(package).items()) if inspect.isclass(each) and hasattr(each, method)]


PROBES, WATCHES, SINKS = classes(probes, "attach"), classes(watches, "update"), classes(sinks, "write")
names = {"ids": lambda each: each.__name__}
GIVEN = {name: torch.randn(4, 2, 800) for name in ("estimates", "references")} | {
    "mixture": torch.randn(4, 800),
    "batch": torch.randn(4, 800),
    "logits": torch.randn(4, 3),
    "targets": torch.tensor([0, 1, 2, 1]),
    "loss": nn.functional.cross_entropy(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 1])),
}


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("kind", PROBES, **names)
def test_a_probe_is_a_frozen_value_that_leaves_no_trace(kind):
    probe = kind()
    assert isinstance(probe, Probe)
    assert is_dataclass(probe)
    assert probe == kind()
    assert kind.__name__ in repr(probe)
    assert pickle.loads(pickle.dumps(probe)) == probe
    assert probe.covers(probe)
    assert not probe.covers(replace(probe, every=7)) or probe.every == 1
    with pytest.raises(AttributeError):
        probe.every = 3
    model = net()
    before = copy.deepcopy(model.__dict__)
    attachment = probe.attach(model)
    assert isinstance(attachment, Attachment)
    attachment.arm(True, "train")
    model(torch.randn(4, 6)).sum().backward()
    attachment.read(GIVEN)
    attachment.detach()
    attachment.detach()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert set(model.__dict__) == set(before)


@pytest.mark.parametrize("kind", PROBES, **names)
def test_no_probe_waits_for_the_device(kind):
    assert_no_sync(kind(), net(), torch.randn(4, 6), GIVEN)


@pytest.mark.parametrize("kind", WATCHES, **names)
def test_a_watch_is_usable_without_arguments_and_its_state_is_json(kind):
    watch = kind()
    assert isinstance(watch, Watch)
    assert watch == kind()
    assert kind.__name__ in repr(watch)
    state = watch.init()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    again, findings = watch.update(state, [])
    assert list(findings) == []
    assert again == watch.init()
    for need in watch.needs:
        assert isinstance(need, Probe)


@pytest.mark.parametrize("kind", [each for each in SINKS if each in (sinks.Memory, sinks.Console)], **names)
def test_a_sink_closes_twice(kind, capsys):
    sink = kind()
    assert isinstance(sink, Sink)
    sink.open(Run("id", "now"))
    sink.write(0, [], [])
    sink.close()
    sink.close()


@pytest.mark.parametrize("kind", [*PROBES, *WATCHES, *SINKS, stethoscope.Monitor], **names)
def test_public_classes_explain_their_arguments_and_show_an_example(kind):
    text = inspect.getdoc(kind) or ""
    if list(inspect.signature(kind).parameters):
        assert "Args:" in text
    assert "Example" in text


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(stethoscope.__path__, "stethoscope.")
    if "integrations" not in module.name and "__main__" not in module.name
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = importlib.import_module(name)
    results = doctest.testmod(
        module, extraglobs={"nn": nn}, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert results.failed == 0
