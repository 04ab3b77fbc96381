"""Accelerate's wrappers around model and optimizer."""

import pytest
import torch

from stethoscope import Monitor

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def accelerator():
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_wrapped_optimizer_is_guarded(accelerator):
    model = torch.nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with Monitor(model, optimizer, guard="skip") as monitor:
        for bad in (False, True):
            before = model.weight.detach().clone()
            x = torch.ones(8, 4)
            x[1, 2] = torch.nan if bad else 1.0
            loss = model(x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)
            assert torch.equal(before, model.weight) == bad
    assert [finding.code for finding in monitor.findings if finding.severity == "error"] == ["nonfinite-input"]
