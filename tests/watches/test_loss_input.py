from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stethoscope import Monitor, Record
from stethoscope.testing import replay
from stethoscope.watches import LossInput


def found(last, loss, steps=60, every=10):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Softmax(-1), nn.Linear(16, 3), last)
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, watches=[LossInput()], every=every, strict=True) as monitor:
        for _ in range(steps):
            x = torch.randn(8, 6)
            value = loss(model(x), x[:, :3].argmax(1))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            monitor.step(loss=value)
    return [(f.code, f.severity, f.module, f.step) for f in monitor.findings if f.code != "probe-read-nothing"]


@pytest.mark.parametrize("last", [nn.Softmax(-1), nn.Sigmoid(), nn.ReLU(), nn.Tanh()])
def test_an_activation_before_a_cross_entropy_is_told_once_at_the_first_step(last):
    assert found(last, F.cross_entropy) == [("loss-input-mismatch", "warning", "3", 0)]


def test_probabilities_for_a_log_loss_are_told():
    assert found(nn.Softmax(-1), F.nll_loss) == [("loss-input-mismatch", "warning", "3", 0)]


@pytest.mark.parametrize(
    ("name", "advice"), [("cross_entropy", "out of"), ("bce", "out of"), ("nll", "log_softmax"), ("ctc", "log_softmax")]
)
def test_what_to_try_fits_the_loss(name, advice):
    (finding,) = replay(LossInput(), [Record(f"loss/{name}_input", 2.0, 0, "head.1")])
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("last", "loss"),
    [
        (nn.Identity(), F.cross_entropy),
        (nn.LogSoftmax(-1), F.nll_loss),
        (nn.Softmax(-1), lambda p, y: F.nll_loss(torch.log(p), y)),
        (nn.Sigmoid(), lambda p, y: F.binary_cross_entropy(p, F.one_hot(y, 3).float())),
        (nn.Sigmoid(), lambda p, y: F.mse_loss(p, F.one_hot(y, 3).float())),
        (nn.ReLU(), lambda p, y: F.mse_loss(p, F.one_hot(y, 3).float())),
        (nn.Softmax(-1), lambda p, y: F.kl_div(torch.log(p), F.one_hot(y, 3).float(), reduction="batchmean")),
        (nn.Identity(), lambda z, y: F.cross_entropy(z, y) + F.kl_div(z.log_softmax(-1), z.detach().softmax(-1), reduction="sum")),
    ],
)  # fmt: skip
def test_losses_that_get_what_they_take_are_fine(last, loss):
    assert found(last, loss) == []


def test_a_second_log_softmax_is_harmless():
    assert found(nn.LogSoftmax(-1), F.cross_entropy) == [("loss-input-mismatch", "info", "3", 0)]


def test_a_loss_without_its_graph_is_no_fault():
    model = nn.Linear(6, 3)
    with Monitor(model, watches=[LossInput()], strict=True) as monitor:
        monitor.step(loss=F.cross_entropy(model(torch.randn(4, 6)).softmax(-1), torch.zeros(4).long()).item())
    assert [f for f in monitor.findings if f.code == "loss-input-mismatch"] == []
