from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stethoscope import Report, audits
from stethoscope.audits._nonfinite_tensor import flags, samples

nan, inf = float("nan"), float("inf")


class Classifier(nn.Module):
    """A front end outside of every module, attention, a feed-forward part."""

    def __init__(self, width=16):
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, width, 3, padding=1)
        self.layer_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.attention_dropout = nn.Dropout(0.1)
        self.fc1 = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(2 * width, 4)

    def front_end(self, x, gain):
        return torch.log((x * gain).square() + 1e-6)

    def forward(self, x, padding_mask=None, gain=1.0):
        x = self.front_end(x, gain)
        x = self.patch_embedding(x[:, None]).mean(2).transpose(1, 2)
        x = self.layer_norm(x)
        y, _ = self.attention(x, x, x, key_padding_mask=padding_mask)
        x = x + self.attention_dropout(y)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 8, 6)


# -- the cases with known truth ------------------------------------------------------------------------------------------


def test_an_inf_of_the_front_end_is_not_blamed_on_the_layer_norm(model, x):
    report = audits.nonfinite(model, x, gain=1e30)
    assert (report.origin, report.module, report.operation) == ("operation", "", "aten.pow")
    assert "in front_end: return torch.log((x * gain).square() + 1e-6)" in report.source
    assert report.first_nan.module == "patch_embedding"
    report = audits.nonfinite(nn.Sequential(model.patch_embedding, nn.Flatten(2), nn.LayerNorm(48)), bad_bin(x))
    assert (report.origin, report.parameter, report.samples) == ("input", None, (1,))
    assert (report.first_inf.module, report.first_nan.module) == ("0", "2")
    assert not report.ok
    assert "innocent" in str(report)


def bad_bin(x):
    x = x[:, None].clone()
    x[1, 0, 2, 3] = inf
    return x


def test_a_nan_in_a_weight_is_named(model, x):
    with torch.no_grad():
        model.fc1.weight[3, 4] = nan
    report = audits.nonfinite(model, x)
    assert (report.origin, report.parameter, report.module) == ("parameter", "fc1.weight", "fc1")
    assert report.first_inf is None
    assert report.first_nan.module == "fc1"


def test_a_finite_but_absurd_weight_is_named_and_the_dropout_is_not(model, x):
    with torch.no_grad():
        model.layer_norm.weight.fill_(4.0)
        model.fc1.weight[3, 4] = -3e38
    report = audits.nonfinite(model, x)
    assert (report.origin, report.parameter, report.module) == ("parameter", "fc1.weight", "fc1")
    assert report.first_inf.module == "fc1"
    assert report.first_nan.module == "dropout"
    assert "-3e+38" in str(report)


def test_a_row_that_is_masked_whole_is_the_softmax_of_one_sample(model, x):
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1] = True
    report = audits.nonfinite(model, x, padding_mask=mask)
    assert (report.origin, report.module, report.operation) == ("operation", "attention", "aten._softmax")
    assert report.samples == (1,)
    assert report.first_inf is None
    assert "y, _ = self.attention(" in report.source
    assert "masked as a whole" in report.findings[0].advice


def test_a_nan_in_one_waveform_is_the_input_and_its_sample(model, x):
    x[2, 3, 1] = nan
    report = audits.nonfinite(model, x)
    assert (report.origin, report.module, report.samples) == ("input", "", (2,))
    assert report.findings[0].evidence["parameter"] == "args.0"


def test_sqrt_of_zero_in_the_loss_is_no_modules_fault(model, x):
    report = audits.nonfinite(model, x, loss=lambda out: (out - out).square().sum().sqrt())
    assert (report.origin, report.module, report.operation) == ("backward", "", "aten.sqrt")
    assert "out.square" in report.source or "(out - out)" in report.source
    assert "in the loss" in report.findings[0].message
    assert "fc1.weight" in report.gradients


class Where(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        y = y - y.detach()
        return torch.where(y > 0, torch.sqrt(y), 0.0)


def test_where_does_not_hide_the_slope_of_sqrt():
    report = audits.nonfinite(Where(), torch.randn(3, 4), loss=torch.sum)
    assert (report.origin, report.operation, report.parameter) == ("backward", "aten.sqrt", None)
    assert "torch.where(y > 0, torch.sqrt(y), 0.0)" in report.source
    assert report.gradients == ("linear.weight", "linear.bias")


def test_log_of_a_negative_loss_is_the_loss(model, x):
    report = audits.nonfinite(model, x, loss=lambda out: torch.log(-out.square().mean()))
    assert (report.origin, report.module, report.operation) == ("loss", "", "aten.log")
    assert report.findings[0].code == "nonfinite-loss"


def test_one_nan_gradient_is_one_parameter(model, x):
    model.fc1.bias.register_hook(lambda grad: grad * nan)
    report = audits.nonfinite(model, x, loss=torch.sum)
    assert (report.origin, report.parameter) == ("backward", "fc1.bias")
    assert "register_hook" in report.source


def test_a_loss_with_its_graph_is_examined_backwards(model, x):
    loss = (model(x) * 0).sum().sqrt()
    report = audits.nonfinite(model, x, loss=loss)
    assert (report.origin, report.operation) == ("backward", "aten.sqrt")
    loss.backward()  # the graph is still the caller's


def test_a_weight_that_half_precision_cannot_hold_is_an_overflow_with_its_headroom():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight.data[1, 1] = 65504.0 * 4
    with torch.autocast("cpu", dtype=torch.float16):
        report = audits.nonfinite(model, torch.randn(3, 4))
    assert (report.origin, report.module, report.operation) == ("operation", "0", "aten._to_copy")
    assert report.findings[0].evidence["headroom_bits"] == -2.0
    assert "bfloat16" in report.findings[0].advice
    assert report.first_inf.module == "0"
    assert report.first_nan is None or report.first_nan.module == "1"


def test_an_absurd_weight_is_found_under_autocast_which_keeps_casts_of_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].weight.data[1, 1] = 1e25
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = audits.nonfinite(model, torch.randn(3, 4))
    assert (report.origin, report.parameter) == ("parameter", "0.weight")


def test_statistics_that_a_removed_nan_poisons_are_told_while_the_output_is_clean():
    class Healed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return torch.nan_to_num(self.norm(x / 0))

    report = audits.nonfinite(Healed(), torch.randn(3, 4))
    assert (report.origin, report.operation) == ("operation", "aten.div")
    assert "reaches the state 'norm.running_mean' of the model" in str(report)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it loads its compiler
@pytest.mark.parametrize("how", ["whole", "part"])
def test_compiled_modules_run_as_they_were_written(how):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].bias.data[0] = nan
    if how == "part":
        model[1].compile()
    report = audits.nonfinite(torch.compile(model) if how == "whole" else model, torch.randn(3, 4))
    assert report.parameter == "1.bias"


# -- healthy -------------------------------------------------------------------------------------------------------------


def causal(x):
    scores = x @ x.transpose(1, 2)
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -inf).softmax(-1)


HEALTHY = {
    "causal mask": causal,
    "mask returned": lambda x: x.masked_fill(x > 0, -inf),
    "float mask": lambda x: (x + torch.full_like(x, -inf).triu(1)).softmax(-1),
    "log of zero in buckets": lambda x: torch.log(x.relu() * 4).to(torch.long).clamp(0, 3).float() + x,
    "log of zero under softmax": lambda x: (x + torch.log((x > -9).float().tril())).softmax(-1),
    "where removes NaN": lambda x: torch.where(x > 0, torch.log(x), x),
    "nan_to_num": lambda x: torch.nan_to_num(x / (x - x)),
    "index assignment": lambda x: (y := torch.sqrt(x), y.__setitem__(y.isnan(), 0.0))[0],
    "in-place fill": lambda x: torch.sqrt(x).masked_fill_(x < 0, 0.0),
    "view of the good half": lambda x: torch.cat([x / 0, x])[3:],
    "empty that is written": lambda x: torch.empty_like(x).copy_(x),
    "amin with a padding of inf": lambda x: x.masked_fill(x > 0, inf).amin(-1),
    "nanmean": lambda x: x.masked_fill(x > 1, nan).nanmean(),
    "reciprocal of inf": lambda x: 1 / (x / 0).abs(),
    "complex": lambda x: torch.fft.rfft(x).abs(),
    "half precision": lambda x: (x.half() * 2).float(),
    "bucket of an empty max": lambda x: x.cummax(-1).values + torch.tensor(-inf).exp(),
}


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(3, 3)

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_finding(name):
    torch.manual_seed(0)
    report = audits.nonfinite(Call(HEALTHY[name]), torch.randn(3, 3, 3))
    assert report.ok
    assert report.origin is None
    assert report.findings == ()
    assert "No NaN or Inf" in str(report)


def test_overwritten_gradients_are_healthy(x):
    model = Where()
    for parameter in model.parameters():
        parameter.register_hook(torch.nan_to_num)
    assert audits.nonfinite(model, torch.randn(3, 4), loss=torch.sum).ok


# -- the training is sacred ----------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    def __init__(self, fail=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True))
        self.calls, self.average, self.fail = 0, torch.zeros(4), fail

    def forward(self, x):
        x.mul_(2)
        self.calls += 1
        y = self.net(x)
        self.average.mul_(0.9).add_(y.detach().mean(0))
        self.eval()
        if self.fail:
            raise RuntimeError("no luck")
        return y


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("sick", [False, True])
def test_nothing_is_left_behind(fail, sick):
    model = Stateful(fail)
    if sick:
        with torch.no_grad():
            model.net[0].bias[0] = nan
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = torch.randn(5, 4)
    before, state, average = x.clone(), copy.deepcopy(model.state_dict()), model.average.clone()
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if fail and not sick:
        with pytest.raises(RuntimeError, match="no luck"):
            audits.nonfinite(model, x, loss=torch.sum)
    else:
        report = audits.nonfinite(model, x, loss=torch.sum)
        assert report.parameter == ("net.0.bias" if sick else None)
        assert ("no luck" in str(report.findings[0].evidence)) == fail if sick else report.ok
    assert torch.equal(x, before)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(model.average, average)
    assert model.calls == 0
    assert model.training
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1] == random.getstate()
    assert (rng[2] == np.random.get_state()[1]).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_graph_that_the_caller_holds_stays_usable():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    loss = model(torch.randn(5, 4)).sum()
    audits.nonfinite(model, torch.randn(5, 4), loss=torch.sum)
    loss.backward()


# -- bad input -----------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(model, x):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        audits.nonfinite(torch.sum, x)
    with pytest.raises(ValueError, match="one number"):
        audits.nonfinite(model, x, loss=lambda out: out)


@pytest.mark.parametrize(
    "loss", [lambda o: {"acc": 1, "loss": o.log().sum()}, lambda o: (o.log().sum(), {}), lambda o: o.log().sum()[None]]
)
def test_a_loss_may_come_in_a_dict_or_a_tuple(loss):
    report = audits.nonfinite(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.randn(4, 2), loss=loss)
    assert (report.origin, report.operation) == ("loss", "aten.log")


def test_it_is_a_report(model, x):
    report = audits.nonfinite(model, x)
    assert isinstance(report, Report)
    report.raise_for_findings()


# -- tensors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_flags_see_one_value_in_every_dtype(dtype, value):
    x = torch.full((3, 50), 1e4, dtype=torch.float32).to(dtype)
    assert not any(flags(x))
    x[1, 7] = value
    assert flags(x) == (np.isnan(value), value == inf, value == -inf)


def test_large_finite_values_are_finite():
    assert not any(flags(torch.full((100,), torch.finfo(torch.float32).max)))
    assert not any(flags(torch.full((100,), 65504.0, dtype=torch.float16)))
    assert not any(flags(torch.arange(3)))


def test_samples_are_found_in_folded_batches():
    x = torch.zeros(6, 4, 4)
    x[5, 1] = nan
    assert samples(x, 3) == (2,)
    assert samples(x.transpose(0, 1), 6) == (5,)
    assert samples(x, 5) == ()


class Through(nn.Module):
    """A function behind a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.mark.parametrize("function", [lambda y: y.sigmoid() * inf, lambda y: y.abs().add(inf)])
def test_numbers_of_the_model_times_inf_are_no_mask(function):
    report = audits.nonfinite(Through(function), torch.randn(3, 4))
    assert report.origin == "operation"
    assert "inf" in report.source


@pytest.mark.parametrize("mask", [lambda: torch.ones(3, 4) * -inf, lambda: torch.zeros(3, 4) - inf])
def test_a_constant_times_inf_is_a_mask(mask):
    report = audits.nonfinite(Through(lambda y: torch.where(y > 9, y, mask()).logaddexp(y)), torch.randn(3, 4))
    assert report.ok
    assert audits.nonfinite(Through(lambda y: torch.where(y > 0, y, mask())), torch.randn(3, 4)).ok
