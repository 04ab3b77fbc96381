from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stethoscope import audits


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))


class Offset(nn.Module):
    """Loses its digits in the second module: nearly equal numbers on an offset."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.first.bias.data.fill_(100.0)
        self.first.weight.data *= 0.1

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reference", ["float64", torch.float32])
def test_a_healthy_model_loses_little(dtype, reference):
    model, x = net(), torch.randn(6, 8)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        report = audits.precision(model, x, reference=reference)
    assert report.ok
    assert report.module is None
    assert [each.module for each in report.modules] == ["0", "1", "2", "3", "4", ""]
    assert all(each.error < report.tolerance for each in report.modules)
    assert report.finite_rms[0] == pytest.approx(1e-6)
    assert "headroom" in str(report)
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_module_that_loses_the_digits_is_named():
    torch.manual_seed(0)
    model = Offset().bfloat16()
    report = audits.precision(model, torch.randn(6, 8, dtype=torch.bfloat16))
    assert report.module == "norm"
    assert report.findings[0].code == "precision-loss"
    by_name = {each.module: each for each in report.modules}
    assert by_name["first"].error < 0.01 < by_name["norm"].error


def test_an_operation_between_modules_is_its_parents():
    class Between(Offset):
        def forward(self, x):
            x = self.first(x)
            return self.last((x - x.mean(-1, keepdim=True)).clone())

    torch.manual_seed(0)
    report = audits.precision(Between().bfloat16(), torch.randn(6, 8, dtype=torch.bfloat16))
    assert report.module == ""


def test_little_headroom_is_told_before_there_is_an_inf():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    x = torch.randn(6, 8)
    model[0].weight.data *= 50000 / float((x @ model[0].weight.detach().T).abs().max())
    model[0].bias.data.zero_()
    with torch.autocast("cpu", dtype=torch.float16):
        report = audits.precision(model, x)
        louder = audits.precision(model, 20 * x)
    assert "precision-headroom" in [each.code for each in report.findings]
    assert report.modules[0].headroom_bits < 1
    assert report.finite_rms[1] < 1e3
    assert louder.module == "0"
    assert math.isinf(louder.modules[0].error)
    assert not louder.ok


def test_two_models_are_compared_by_the_names_of_their_modules():
    model = net().eval()
    other = copy.deepcopy(model)
    assert audits.precision(model, torch.randn(3, 8), reference=other).module is None
    with torch.no_grad():
        other[4].weight += 1
    report = audits.precision(model, torch.randn(3, 8), reference=other)
    assert report.module == "4"


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="Module"):
        audits.precision(torch.sum, torch.ones(2))
    with pytest.raises(ValueError, match="float64"):
        audits.precision(net(), torch.ones(2, 8), reference="int8")


class Statistics(nn.Module):
    """Loses its digits where BatchNorm takes its statistics from the batch, not where they are stored."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.attention = (
            nn.BatchNorm1d(4),
            nn.Dropout(0.5),
            nn.MultiheadAttention(4, 1, dropout=0.5),
        )

    def forward(self, x):
        y = self.drop(self.norm(x))
        return self.attention(y, y, y)[0]


def test_train_mode_looks_at_the_statistics_of_the_batch_and_leaves_dropout_off():
    torch.manual_seed(0)
    model, x = Statistics().bfloat16(), (1000 + torch.randn(16, 4)).bfloat16()
    before = copy.deepcopy(model.state_dict())
    trained = audits.precision(model, x, mode="train")
    assert audits.precision(Statistics(), torch.randn(16, 4), mode="train").ok
    by_name = {each.module: each for each in trained.modules}
    assert by_name["norm"].absmax < 10
    stored = {each.module: each for each in audits.precision(model, x).modules}
    assert stored["norm"].absmax > 900
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_sweep_tells_silence_and_ones_and_follows_keywords():
    class Level(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, tokens, *, signal):
            x = signal["x"]
            return self.linear(x / x.std(-1, keepdim=True)) + tokens[:, None]

    report = audits.precision(Level(), torch.arange(3), signal={"x": torch.randn(3, 4)})
    assert {name for name, finite in report.sweep.items() if not finite} == {"silence", "ones"}
    assert list(report.sweep)[2:] == ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1", "10", "100", "1000"]
    assert report.finite_rms == (pytest.approx(1e-6), 1000.0)
    assert "Not finite for input of silence, ones." in str(report)
    integers = audits.precision(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.randint(0, 5, (2, 4)))
    assert (integers.sweep, integers.finite_rms) == ({}, None)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8)])
def test_a_norm_whose_input_hardly_varies_is_told_before_there_is_a_nan(norm):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8, bias=False), norm), torch.randn(6, 8)
    assert audits.precision(model, x).ok
    (finding,) = audits.precision(model, 1e-4 * x).findings
    assert (finding.code, finding.severity, finding.module) == ("precision-headroom", "warning", "1")
    assert "100% of what '1' normalises has a variance below its eps (1e-05)" in finding.message
    padded = torch.cat([x, torch.zeros(20, 8)])
    assert audits.precision(model, padded).ok


def test_a_device_that_is_not_here_or_is_the_models_own_is_refused():
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"this machine has no {missing} device"):
        audits.precision(net(), torch.ones(2, 8), reference=missing)
    with pytest.raises(ValueError, match="on cpu already"):
        audits.precision(net(), torch.ones(2, 8), reference=torch.device("cpu"))
    with pytest.raises(ValueError, match="'eval' or 'train'"):
        audits.precision(net(), torch.ones(2, 8), mode="both")


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_and_the_cpu_agree():
    device = torch.accelerator.current_accelerator()
    model, x = net(), torch.randn(6, 8)
    for tested, given, reference in ((model, x, device), (copy.deepcopy(model).to(device), x.to(device), "cpu")):
        report = audits.precision(tested, given, reference=reference)
        assert report.ok, str(report)
        assert 0 <= max(each.error for each in report.modules) < 1e-4


class Front(nn.Module):
    """Overflows in fp16, in an operation outside of every module."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x * 2**15)


def test_what_is_not_finite_is_explained_and_the_model_is_not_quoted():
    model = Front().half()
    report = audits.precision(model, torch.linspace(1, 8, 32).half().view(4, 8))
    born, lost = report.findings[:2]
    assert (born.code, born.evidence["operation"]) == ("nonfinite-activation", "aten.mul")
    assert (lost.code, lost.cause) == ("precision-loss", "nonfinite-activation")
    assert lost.message.startswith("What the model returns is not finite")
    assert model.training


@pytest.mark.parametrize("bad", ["weight", "input"])
def test_what_is_not_finite_in_both_precisions_is_not_ok(bad):
    model, x = net(), torch.randn(6, 8)
    if bad == "weight":
        model[4].weight.data[1, 2] = math.nan
    else:
        x[3, 1] = math.nan
    report = audits.precision(model, x)
    assert [each.code for each in report.findings] == ["nonfinite-parameter" if bad == "weight" else "nonfinite-input"]


def test_a_mask_in_the_output_is_no_loss_of_precision():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(4) > 2, -math.inf)

    assert audits.precision(Masked(8, 4), torch.randn(6, 8)).ok
