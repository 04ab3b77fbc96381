from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stethoscope import Monitor
from stethoscope.testing import replay, series
from stethoscope.watches import LossInput, TargetHealth


def train(targets, last=None, loss=F.mse_loss, given=None, steps=120, names=("outputs", "targets")):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1), *([] if last is None else [last]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[LossInput(), TargetHealth()], every=10, strict=True) as monitor:
        for _ in range(steps):
            x = torch.randn(32, 6)
            y = targets(x)
            outputs = model(x)[:, 0]
            value = loss(outputs, y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            monitor.step(loss=value, **{names[0]: outputs, names[1]: y if given is None else given(y)})
    return [(f.code, f.module) for f in monitor.findings if f.severity != "info"]


def signed(x):
    return x[:, 0] + 0.1 * torch.randn(len(x))


ALL = [nn.Sigmoid(), nn.ReLU(), nn.Softplus(), nn.Tanh()]


@pytest.mark.parametrize("last", ALL)
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, lambda y, t: (y - t).square().sum() / len(t)])
def test_targets_beyond_the_last_activation(last, loss):
    assert train(lambda x: 3 * signed(x), last, loss) == [("activation-saturated", "3")]


@pytest.mark.parametrize("last", [None, nn.LeakyReLU(), nn.ELU()])
def test_signed_targets_are_fine_where_outputs_can_be_negative(last):
    assert train(signed, last) == []


@pytest.mark.parametrize("last", ALL)
def test_targets_within_reach_are_fine(last):
    assert train(lambda x: signed(x).sigmoid(), last) == []


def test_a_few_targets_just_out_of_reach_are_noise():
    assert train(lambda x: signed(x).abs() - 0.02, nn.ReLU()) == []


def test_targets_that_the_loss_does_not_compare_say_nothing():
    assert train(lambda x: signed(x).sigmoid(), nn.Sigmoid(), given=lambda y: 255 * y) == []


def test_targets_without_standardisation_and_outputs_that_have_arrived():
    far = lambda x: 3e5 + 8e4 * signed(x)  # noqa: E731
    assert train(far) == [("input-range", "")]

    class Scaled(nn.Module):
        def forward(self, y):
            return 3e5 + 8e4 * y

    assert train(far, Scaled()) == []


def test_targets_that_are_one_number():
    assert train(lambda x: torch.ones(len(x))) == [("input-constant", "")]
    assert train(lambda x: torch.zeros(len(x)), steps=250) == [("input-constant", "")]
    turn = iter(range(1000))
    assert train(lambda x: torch.full((len(x),), float(next(turn)))) == []


@pytest.mark.parametrize("every", [30, 70])
def test_rare_events_leave_many_batches_of_zeros(every):
    turn = iter(range(1000))
    # looked at every ten steps
    assert train(lambda x: (torch.arange(len(x)) < (next(turn) % every == 0)).float(), steps=400) == []


def test_targets_that_become_one_number():
    turn = iter(range(1000))
    assert train(lambda x: signed(x) * (next(turn) < 100), steps=300) == [("input-constant", "")]


@pytest.mark.parametrize(("high", "codes"), [(8000.0, []), (5000.0, ["input-range"])])
def test_a_few_outliers_are_no_scale(high, codes):
    said = {"output/rms": 3.0, "target/rms": 1200.0, "target/low": -5.0, "target/high": high}
    said |= {"target/beyond": 0.0, "target/loss_gap": 0.0}
    records = series(range(0, 300, 50), **{name: [value] * 6 for name, value in said.items()})
    assert [finding.code for finding in replay(TargetHealth(), records)] == codes


@pytest.mark.parametrize(("labels", "codes"), [(1, []), (2, ["loss-input-mismatch"])])
def test_labels_of_one_and_two_in_a_binary_cross_entropy(labels, codes):
    targets = lambda x: (x[:, 0] > 0).float() + labels - 1  # noqa: E731
    assert [
        code for code, _ in train(targets, None, F.binary_cross_entropy_with_logits, names=("logits", "labels"))
    ] == codes


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss, lambda y, t: (y - t).abs().mean()])
@pytest.mark.parametrize("turn", [False, True])
def test_each_output_against_each_target(loss, turn):
    crossed = lambda y, t: loss(y, t[:, None]) if turn else loss(y[:, None], t)  # noqa: E731
    assert train(signed, loss=crossed) == [("loss-input-mismatch", "")]


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: F.softplus(-(y[:, None] - y[None]) * (t[:, None] - t[None]).sign()).mean(),  # a ranking loss
        lambda y, t: (y[:, None] - torch.linspace(-1, 1, 5)).square().mean(),  # distances to five places
        lambda y, t: (y[:, None].expand(-1, 32)[:, :4] - t[:, None]).square().mean(),
    ],
)
def test_differences_between_all_outputs_are_fine(loss):
    assert train(signed, loss=loss) == []


@pytest.mark.parametrize(("scale", "codes"), [(32768.0, ["input-range"]), (1.0, [])])
def test_inputs_read_as_integers_beside_targets_read_as_floats(scale, codes):
    torch.manual_seed(0)

    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(x.abs().log1p()).sigmoid() * x

    model = Mask()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    with Monitor(model, optimizer, watches=[TargetHealth()], every=10, strict=True) as monitor:
        for _ in range(100):
            clean = torch.randn(8, 16)
            out = model(scale * (clean + 0.3 * torch.randn(8, 16)))
            loss = (out.abs() ** 0.3 - clean.abs() ** 0.3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, outputs=out, targets=clean)
    assert [f.code for f in monitor.findings if f.severity != "info"] == codes
