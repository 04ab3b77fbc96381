from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stethoscope import audits


class FilterBank(nn.Module):
    """Like BEATs: waveforms times 2^15, DC removed, a power spectrum by a matrix product, a logarithm."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def front_end(self, x):
        x = (x - x.mean(-1, keepdim=True)) * 2**15
        power = torch.fft.rfft(x.float()).abs().square()
        return torch.mm(power, torch.full((power.shape[1], 6), 0.1)).clamp(min=1e-5).log()

    def forward(self, x):
        return self.head(self.front_end(x))


def test_a_front_end_that_overflows_in_half_precision_only():
    torch.manual_seed(0)
    model = FilterBank()
    before = copy.deepcopy(model.state_dict())
    report = audits.stress(model, torch.randn(4, 40) * 0.1)
    bad = {(trial.input, trial.precision) for trial in report.failures()}
    assert ("as given", "autocast float16") in bad
    assert ("ones", "autocast float16") not in bad
    assert {precision for _, precision in bad} <= {"autocast float16", "float16"}
    finding = next(each for each in report.findings if each.evidence["operation"])
    assert finding.code == "nonfinite-stress"
    assert "front_end" in finding.evidence["source"]
    assert not report.ok
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Level(nn.Linear):
    def forward(self, x):
        return super().forward(x / x.std(-1, keepdim=True))


def test_silence_is_found_and_its_division_named():
    report = audits.stress(Level(4, 2), torch.randn(3, 4))
    bad = {trial.input for trial in report.failures() if trial.precision == "as is"}
    assert bad == {"silence", "ones", "constant"}
    assert report.findings[0].severity == "error"
    assert report.findings[0].evidence["operation"] == "aten.div"


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return torch.sqrt(self.linear(x).square().sum(-1))


def test_a_gradient_that_is_born_in_silence_counts():
    failed = [trial for trial in audits.stress(Root(), torch.randn(3, 4)).failures() if trial.precision == "as is"]
    assert [trial.input for trial in failed] == ["silence"]
    assert failed[0].report.origin == "backward"


def embedding():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.randint(0, 9, (3, 5))


def convolution():
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.GELU(), nn.Conv1d(4, 2, 3)), torch.randn(3, 1, 30)


def transformer():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)


def batch_norm():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(3, 4)


@pytest.mark.parametrize("make", [embedding, convolution, transformer, batch_norm], ids=lambda make: make.__name__)
@pytest.mark.parametrize("train", [True, False])
def test_a_healthy_model_costs_one_line(make, train):
    torch.manual_seed(0)
    model, x = make()
    report = audits.stress(model.train(train), x)
    assert report.ok, str(report)
    assert [finding.severity for finding in report.findings] in ([], ["info"])
    assert {trial.precision for trial in report.trials} >= {"as is", "autocast float16", "bfloat16"}
    assert model.training == train
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_bad_sample_that_spreads_is_told():
    model = nn.BatchNorm1d(4)
    finding = audits.stress(model, torch.randn(3, 4)).findings[-1]
    assert finding.severity == "info"
    assert finding.evidence["samples"] == [0, 1, 2]
    assert audits.stress(model.eval(), torch.randn(3, 4)).findings == ()


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="must be a tensor"):
        audits.stress(Root(), [1.0])
    with pytest.raises(TypeError, match="must hold a tensor"):
        audits.stress(Root(), (1.0, {}))
    with pytest.raises(ValueError, match="not empty"):
        audits.stress(Root(), torch.zeros(0, 4))
    with pytest.raises(RuntimeError, match="shapes"):
        audits.stress(Root(), torch.randn(3, 7))


class Attentive(nn.Module):
    """Self-attention, and a pooling that divides by lengths."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, padding=None, *, lengths=None):
        y = x if x.is_floating_point() else self.table(x)
        y = self.attention(y, y, y, key_padding_mask=padding)[0]
        return y if lengths is None else y.sum(1) / lengths[:, None]


def failed(report):
    return {trial.input for trial in report.failures() if trial.precision == "as is"}


def refused(report):
    return {trial.input for trial in report.trials if trial.verdict == "refused" and trial.precision == "as is"}


@pytest.mark.parametrize("floats", [True, False])
@pytest.mark.parametrize("form", [tuple, dict])
def test_all_padding_and_lengths_of_zero_are_found(form, floats):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8) if floats else torch.randint(1, 9, (3, 5))
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[2, 3:] = True
    given = (x, padding) if form is tuple else {"x": x, "padding": padding, "lengths": torch.tensor([5, 5, 3])}
    report = audits.stress(Attentive(), given)
    name = "'1'" if form is tuple else "'padding'"
    expected = {f"{name} all True in one item"} | ({"'lengths' is 0 in one item"} if form is dict else set())
    assert expected <= failed(report)
    assert not any("False" in each for each in failed(report))
    assert refused(report) <= {"length 1 in dimension 2", "twice the length in dimension 2"}
    (finding,) = [each for each in report.findings if each.evidence["operation"] == "aten._softmax"]
    assert (finding.severity, finding.module) == ("warning", "attention")


def test_an_embedding_is_read_at_the_ends_of_its_range():
    seen = set()

    class Table(nn.Embedding):
        def forward(self, x):
            seen.update(x.flatten().tolist())
            return super().forward(x)

    report = audits.stress(nn.Sequential(Table(11, 4), nn.Linear(4, 2)), torch.randint(2, 5, (3, 6)))
    assert report.ok
    assert {0, 10} <= seen <= set(range(11))
    with torch.no_grad():
        model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2))
        model[0].weight[10] = torch.nan
    report = audits.stress(model, torch.randint(2, 5, (3, 6)))
    assert "largest" in failed(report)


def test_lengths_follow_the_signal():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x, mask, lengths, scale, name="x"):
            assert x.shape[:2] == mask.shape
            assert lengths.shape[0] == x.shape[0]
            assert int(lengths.max()) <= x.shape[1]
            return self.linear(x * mask[..., None]).sum(1) / lengths.clamp(min=1)[:, None] * scale

    x, mask = torch.randn(3, 6, 4), torch.ones(3, 6, dtype=torch.int64)
    report = audits.stress(Pooled(), (x, mask, torch.tensor([6, 4, 2]), torch.ones(2), "name"))
    assert report.ok, str(report)
    assert refused(report) == {"length 1 in dimension 2", "twice the length in dimension 2"}
    names = {trial.input for trial in report.trials}
    assert {"'1' all 1 in one item", "'1' all 0 in one item", "'2' is 0 in one item", "'2' at their longest"} <= names


def test_what_the_model_refuses_is_said():
    class Picky(nn.Linear):
        def forward(self, x):
            if x.dtype is torch.float16:
                raise RuntimeError("no kernel for float16")
            return super().forward(x)

    lines = audits.stress(Picky(4, 2), torch.randn(3, 4)).summary.split("\n")
    assert lines[1:] == [
        "Not tried in float16: RuntimeError: no kernel for float16",
        "Refused: length 1 in dimension 1, twice the length in dimension 1. (.trials has the exceptions.)",
    ]
    assert "\n" not in audits.stress(nn.Tanh(), torch.randn(3, 4)).summary
