from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, probes, sinks
from stethoscope._protocols import Key

FROZEN, UNHELD, RESTING, IDLE, TRAINED = range(5)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def records(model, optimizers, loop, steps=3):
    memory = sinks.Memory()
    with Monitor(model, optimizers, probes=[probes.Optimizers()], sinks=[memory], every=1, strict=True) as monitor:
        for _ in range(steps):
            loop()
            monitor.step()
    return [r for r in memory.records if r.source == "probe"]


def values(found, name, step=2):
    return {r.module: r.value for r in found if r.name == name and r.step == step}


def test_roles_tell_what_is_frozen_forgotten_unused_and_trained():
    model = net()
    model.add_module("extra", nn.Linear(3, 3))  # in the optimizer, not in the forward pass
    model[0].weight.requires_grad = False
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n != "2.bias"], lr=0.1)

    def loop():
        optimizer.zero_grad()
        model[2](model[1](model[0](torch.randn(6, 4)))).square().mean().backward()
        optimizer.step()

    found = records(model, optimizer, loop)
    roles = values(found, "parameter/role")
    assert roles == {
        "0.weight": FROZEN,
        "0.bias": TRAINED,
        "2.weight": TRAINED,
        "2.bias": UNHELD,
        "extra.weight": IDLE,
        "extra.bias": IDLE,
    }
    assert values(found, "optimizer/steps") == {"": 1.0}


def test_an_optimizer_that_does_not_step_in_this_step_leaves_its_parameters_resting():
    model = net()
    first, second = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)
    step = iter([(first, second), (first,), (first,)])

    def loop():
        model.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        for optimizer in next(step):
            optimizer.step()

    roles = values(records(model, [first, second], loop), "parameter/role")
    assert roles == {"0.weight": TRAINED, "0.bias": TRAINED, "2.weight": RESTING, "2.bias": RESTING}


def test_the_applied_norm_is_that_after_clipping():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        optimizer.zero_grad()
        (100 * model(torch.randn(6, 4)).square().mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    applied = values(records(model, optimizer, loop), "gradient/applied_norm")
    assert sum(v * v for v in applied.values()) ** 0.5 == pytest.approx(0.5, rel=1e-3)


def test_a_scaler_says_by_what_it_has_divided_and_clipping_shows_under_it():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)

    def loop():
        optimizer.zero_grad()
        scaler.scale(100 * model(torch.randn(6, 4)).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()

    found = records(model, optimizer, loop)
    assert values(found, "gradient/scale", step=0) == {"": 2.0**12}
    assert values(found, "gradient/scale") == {"": 2.0**14}
    applied = values(found, "gradient/applied_norm")
    assert sum(v * v for v in applied.values()) ** 0.5 == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("zeroed", ["before backward", "after step", "set to zero", "never"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_gradients_that_are_not_zeroed_are_seen_and_accumulation_within_a_step_is_none(zeroed, passes, clip):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loop():
        if zeroed in ("before backward", "set to zero"):
            optimizer.zero_grad(set_to_none=zeroed == "before backward")
        for _ in range(passes):
            model(torch.randn(6, 4)).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if zeroed == "after step":
            optimizer.zero_grad()

    carried = values(records(model, optimizer, loop), "gradient/carried").get("", 0.0)
    assert carried == (1.0 if zeroed == "never" else 0.0)


def test_state_that_is_not_finite_is_named():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())

    def loop():
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        optimizer.state[model[2].weight]["exp_avg_sq"][0, 0] = torch.inf

    assert values(records(model, optimizer, loop), "optimizer/nonfinite") == {"2.weight": 1.0}


def test_finite_state_too_large_to_square_is_finite():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loop():
        optimizer.zero_grad()
        (1e18 * model(torch.randn(6, 4)).square().mean()).backward()
        optimizer.step()

    assert values(records(model, optimizer, loop), "optimizer/nonfinite") == {}


def test_a_frozen_parameter_that_an_optimizer_still_moves_is_held():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loop():
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        model[0].weight.requires_grad = False

    assert values(records(model, optimizer, loop), "parameter/held") == {"0.weight": 1.0}


def test_nothing_is_left_on_optimizers_afterwards():
    from torch.optim import optimizer as torch_optimizer

    before = len(torch_optimizer._global_optimizer_post_hooks)
    model = net()
    with Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), probes=[probes.Optimizers()], every=1) as monitor:
        model(torch.randn(6, 4)).sum().backward()
        monitor.step()
        assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    assert len(torch_optimizer._global_optimizer_post_hooks) == before
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_monitor_that_nobody_steps_any_more_does_not_grow():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    attached = probes.Optimizers().attach(model)
    attached.arm(on=True, phase="train")
    sizes = []
    for _ in range(3):
        for _ in range(200):
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
        sizes.append(len(attached._columns))
    readings = attached.read({})
    attached.detach()
    assert sizes[0] == sizes[2]
    assert readings[Key("optimizer/steps")] == 600
