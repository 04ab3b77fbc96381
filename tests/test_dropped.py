"""A monitor that nobody closes goes, and everything of it."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizers

from stethoscope import Monitor, presets
from stethoscope._dropped import under_way
from stethoscope.probes import Activations


@pytest.fixture(autouse=True)
def _none_of_other_tests():
    gc.collect()


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(model, optimizer, monitor=None, steps=3):
    for step in range(steps):
        loss = model(torch.full((4, 4), step + 1.0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if monitor is not None:
            monitor.step(loss=loss)


def left(model, optimizer):
    """Everything of a monitor that outlives it in torch."""
    modules = [(m._forward_hooks, m._forward_pre_hooks, m._backward_hooks) for m in model.modules()]
    parameters = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()]
    on_optimizer = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    everywhere = [torch_optimizers._global_optimizer_post_hooks, torch_optimizers._global_optimizer_pre_hooks]
    found = [
        hook for each in (*modules, *parameters, on_optimizer, everywhere) for hooks in each if hooks for hook in hooks
    ]
    dynamo = sys.modules.get("torch._dynamo")
    stance = "default" if dynamo is None else dynamo.eval_frame._stance.stance
    return [*found, *([] if stance == "default" else [stance])]


@pytest.mark.parametrize("guard", [None, "skip", "raise"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_is_dropped_leaves_no_hook_without_waiting_for_the_collector(guard, steps):
    model, optimizer = make()
    monitor = Monitor(model, optimizer, **presets.full(), every=2, guard=guard)
    train(model, optimizer, monitor, steps)
    assert left(model, optimizer)
    gc.disable()
    try:
        del monitor
        assert not left(model, optimizer)
    finally:
        gc.enable()


def test_an_exception_in_a_function_that_trains_leaves_no_hook_and_training_may_begin_again():
    model, optimizer = make()

    def broken():
        monitor = Monitor(model, optimizer, **presets.first_aid(), every=1, guard="skip")
        train(model, optimizer, monitor)
        model(torch.ones(4, 5))

    with pytest.raises(RuntimeError, match="shapes"):
        broken()
    assert not left(model, optimizer)
    with Monitor(model, optimizer, **presets.first_aid(), every=1, strict=True) as monitor:
        train(model, optimizer, monitor)
    assert not left(model, optimizer)


def test_one_that_refers_to_itself_goes_with_the_collector():
    model, optimizer = make()

    def stops_itself():
        monitors = []
        monitors.append(Monitor(model, optimizer, **presets.first_aid(), on_finding=lambda _: monitors[0].close()))

    stops_itself()
    gc.collect()
    assert not left(model, optimizer)


@pytest.mark.parametrize("place", ["module", "optimizer"])
def test_the_collector_may_come_between_two_hooks(place):
    model, optimizer = make()
    held = [Monitor(model, optimizer, **presets.full(), every=1, guard="skip")]
    dropped = []

    def drop(*_):
        if held:
            held.pop()
            gc.collect()
            dropped.append(left(model, optimizer))

    if place == "module":
        # first of the hooks, as torch has asked for all of them but not for how they are to be called
        handles = [model.register_forward_pre_hook(drop, prepend=True)]
    else:
        handles = [optimizer.register_step_post_hook(drop), optimizer.register_step_post_hook(lambda *_: None)]
    train(model, optimizer, steps=1)
    (meanwhile,) = dropped
    assert len(meanwhile) > 5
    for handle in handles:
        handle.remove()
    gc.collect()
    assert not left(model, optimizer)


def test_the_weights_are_those_of_a_training_without_a_monitor():
    model, optimizer = make()
    monitor = Monitor(model, optimizer, **presets.full(), every=1, guard="skip")
    train(model, optimizer, monitor, steps=2)
    del monitor
    train(model, optimizer, steps=2)
    twin, other = make()
    train(twin, other, steps=2)
    train(twin, other, steps=2)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_monitor_that_could_not_be_made_leaves_nothing():
    class Broken:
        every = None

        def attach(self, model):
            return self

        def covers(self, other):
            return False

        def arm(self, on, phase):
            raise RuntimeError("no")

        def detach(self):
            pass

    model, optimizer = make()
    with suppress(RuntimeError):  # which holds what has failed until it is handled
        Monitor(model, optimizer, probes=[Activations(), Broken()], guard="skip", strict=True)
    gc.collect()
    assert not left(model, optimizer)


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_frames_are_listed(monkeypatch, collects):
    """What the collector calls would list them again, behind a lock of Python's that is held already: a training that hangs."""
    seen = []
    listed = sys._current_frames

    def listing():
        seen.append(gc.isenabled())
        return listed()

    monkeypatch.setattr(sys, "_current_frames", listing)
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        assert not under_way((), here=True)
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False]
