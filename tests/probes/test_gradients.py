from __future__ import annotations

import pytest
import torch
from torch import nn

from stethoscope import Monitor, audits, sinks
from stethoscope.probes import Gradients


def run(model, steps, every=1, probe=None):
    """Call each step with the model and a function that backpropagates; return the records."""
    memory = sinks.Memory()
    with Monitor(model, probes=[probe or Gradients()], sinks=[memory], every=every, strict=True) as monitor:
        for step in steps:
            model.zero_grad()
            step(model)
            monitor.step()
    return memory.records


def values(records, name, step=0):
    return {record.module: record.value for record in records if record.name == name and record.step == step}


def test_norms_are_those_before_clipping_and_after_the_last_micro_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    expected = {}

    def step(model):
        for _ in range(3):
            model(torch.randn(5, 4)).square().sum().backward()
        expected.update({name: p.grad.norm().item() for name, p in model.named_parameters()})
        expected[""] = nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()

    seen = values(run(model, [step]), "gradient/norm")
    assert seen == pytest.approx(expected, rel=1e-5)


def test_the_guilty_parameter_is_seen_although_clipping_spreads_its_nan():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    model[0].weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), torch.nan))

    def step(model):
        model(torch.ones(5, 4)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    assert values(run(model, [step]), "gradient/nonfinite") == {"0.weight": 4.0, "": 4.0}


def test_frozen_and_unused_parameters_have_no_record_and_unfreezing_is_noticed():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.used(x))

    model = Model()

    def step(model):
        model(torch.ones(3, 2)).sum().backward()
        model.frozen.requires_grad_(True)

    records = run(model, [step, step])
    assert set(values(records, "gradient/norm", 0)) == {"used.weight", "used.bias", ""}
    assert set(values(records, "gradient/norm", 1)) == {"used.weight", "used.bias", "frozen.weight", "frozen.bias", ""}


def test_nothing_is_hooked_between_observed_steps():
    model = nn.Linear(2, 2)
    with Monitor(model, probes=[Gradients()], every=3, strict=True) as monitor:
        hooked = []
        for _ in range(5):
            hooked.append(bool(model.weight._post_accumulate_grad_hooks))
            model(torch.ones(3, 2)).sum().backward()
            monitor.step()
    assert hooked == [True, False, False, True, False]
    assert not model.weight._post_accumulate_grad_hooks


def test_a_shared_parameter_is_named_once_and_half_precision_is_summed_in_float32():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).half()
    model[1].weight = model[0].weight

    def step(model):
        (model(torch.full((3, 2), 200.0, dtype=torch.half)).float().sum() * 100).backward()

    seen = values(run(model, [step]), "gradient/norm")
    assert set(seen) == {"0.weight", ""}
    assert seen["0.weight"] > 0


def test_sparse_gradients_of_embeddings():
    model = nn.Embedding(10, 4, sparse=True)
    seen = values(run(model, [lambda model: model(torch.tensor([1, 1, 3])).sum().backward()]), "gradient/norm")
    assert seen["weight"] == pytest.approx((4 * 2**2 + 4) ** 0.5)


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="Known"):
        Gradients(("std",))


def test_a_lazy_module_is_read_once_it_has_a_shape():
    model, memory = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), sinks.Memory()
    with Monitor(model, probes=[Gradients(every=1)], sinks=[memory], strict=True) as monitor:
        for _ in range(2):
            loss = model(torch.randn(5, 4)).square().mean()
            loss.backward()
            monitor.step(loss=loss)
    norms = [(r.step, r.module) for r in memory.records if r.name == "gradient/norm"]
    assert (0, "0.weight") not in norms
    assert (1, "0.weight") in norms


def test_a_model_that_moves_between_the_start_of_a_step_and_its_backward_is_read():
    model, memory = nn.Linear(4, 1), sinks.Memory()
    with Monitor(model, probes=[Gradients(every=1)], sinks=[memory], strict=True) as monitor:
        for step in range(2):
            model.to(torch.float64 if step else torch.float32)
            model(torch.randn(5, 4, dtype=model.weight.dtype)).square().mean().backward()
            monitor.step()
    last = {r.module: r.value for r in memory.records if r.step == 1 and r.name == "gradient/norm"}
    assert last["weight"] == pytest.approx(model.weight.grad.norm().item(), rel=1e-6)


def test_the_backward_pass_of_an_audit_is_not_the_steps():
    model = nn.Linear(4, 1)
    expected = {}

    def step(model):
        model(torch.ones(2, 4)).square().mean().backward()
        expected.update({name: each.grad.norm().item() for name, each in model.named_parameters()})
        audits.nonfinite(model, torch.full((2, 4), 100.0), loss=lambda out: out.square().mean())

    seen = values(run(model, [step]), "gradient/norm")
    assert {name: seen[name] for name in expected} == pytest.approx(expected)
