"""Seeded faults in eight small models, each with the one right answer, and the same models healthy."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from stethoscope import audits

nan, inf = float("nan"), float("inf")


class LanguageModel(nn.Module):
    """Causal attention by hand, keywords only, tied weights, a float mask."""

    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.full((5, 5), -inf).triu(1))
        self.temperature, self.scale_in = 1.0, 1.0

    def attend(self, x, layer, attention_mask):
        q, k, v = self.qkv[layer](self.norms[layer](x)).chunk(3, -1)
        scores = q @ k.mT / (8**0.5 * self.temperature) + self.mask
        if attention_mask is not None:
            scores = scores + attention_mask
        return x + torch.softmax(scores, -1) @ v

    def forward(self, *, input_ids, attention_mask=None):
        x = self.embedding(input_ids) * self.scale_in
        for layer in range(2):
            x = self.attend(x, layer, attention_mask)
        return {"logits": self.head(x), "hidden": x}


class TCN(nn.Module):
    """Convolutions with weight norm, views changed in place, one module called twice."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv1d(1, 8, 4, stride=2)
        self.blocks = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1)) for _ in range(3)
        )
        self.norm = nn.GroupNorm(1, 8)
        self.mask = nn.Conv1d(8, 16, 1)
        self.gain = 1.0

    def forward(self, x):
        x = x / x.std(-1, keepdim=True)
        e = self.encoder(x[:, None])
        y = e.clone()
        for block in self.blocks:
            y = self.norm(F.relu(block(y), inplace=True)) + y
        masks = self.mask(y).unflatten(1, (2, 8))
        masks[:, 0].mul_(0.5)
        masks[:, 1].mul_(self.gain).exp_()
        return masks * e[:, None]


class Tagger(nn.Module):
    """An LSTM over packed sequences; returns a tuple with states."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.Linear(6, 1)
        self.out = nn.Linear(6, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.project(x), lengths, batch_first=True, enforce_sorted=False)
        y, state = self.lstm(packed)
        y, _ = pad_packed_sequence(y, batch_first=True)
        valid = torch.arange(y.shape[1])[None] < lengths[:, None]
        weights = self.attention(y)[..., 0].masked_fill(~valid, -inf).softmax(-1)
        pooled = (weights[..., None] * y).sum(1) / lengths[:, None]
        return self.out(pooled), state


class SpectrogramMask(nn.Module):
    """Complex numbers: a mask on a spectrum, magnitudes in dB."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 9))
        self.floor = 1e-5

    def forward(self, x):
        spectrum = torch.stft(x, 16, 8, window=torch.hann_window(16), return_complex=True)
        level = self.decibels(spectrum)
        mask = self.net(level.mT).mT.sigmoid()
        return torch.istft(spectrum * mask, 16, 8, window=torch.hann_window(16)), level

    def decibels(self, spectrum):
        return 20 * torch.log10(spectrum.abs() + self.floor)


class Residual(nn.Module):
    """BatchNorm, dropout, activation checkpointing, a moving average as a plain attribute, a functional weight."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.inp = nn.Linear(6, 12)
        self.norm = nn.BatchNorm1d(12)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12))
        self.drop = nn.Dropout(0.2)
        self.code = nn.Parameter(torch.randn(12))
        self.level, self.reentrant = torch.ones(12), reentrant

    def forward(self, x):
        x = self.norm(self.inp(x)) / self.level
        x = x + checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.drop(x * F.softplus(self.code))


class Encoder(nn.Module):
    """A torch transformer; nested tensors in eval mode; a method other than forward."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.front = nn.Linear(8, 8)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def extract_features(self, x, padding_mask=None):
        return self.layers(self.filterbank(x), src_key_padding_mask=padding_mask)

    def filterbank(self, x):
        scaled = x * 2**15
        return self.front(torch.log1p((scaled @ torch.ones(8, 8, dtype=x.dtype)).abs()))


class Nested(nn.Module):
    """Works on nested tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.log(self.linear(x).sin() + 1.01)


class Mixture(nn.Module):
    """A Gaussian mixture: log-variances, a determinant, layer drop."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.mean, self.log_variance = nn.Linear(5, 2), nn.Linear(5, 2)
        self.dropped = 1

    def forward(self, x):
        for i, layer in enumerate(self.body):
            if i != self.dropped:
                x = torch.tanh(layer(x))
        return self.mean(x), self.log_variance(x)


def likelihood(target):
    def loss(output):
        mean, log_variance = output
        return (0.5 * (log_variance + (target - mean) ** 2 / log_variance.exp())).mean()

    return loss


@dataclass
class Case:
    model: nn.Module
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Any = None
    forward: Any = None
    context: Any = None

    def audit(self):
        with self.context or nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own about nested tensors and checkpoints
            return audits.nonfinite(self.model, *self.args, loss=self.loss, forward=self.forward, **self.kwargs)


def language():
    return Case(LanguageModel(), kwargs={"input_ids": torch.randint(0, 11, (3, 5))})


def tcn():
    return Case(TCN(), (torch.randn(3, 40),))


def tagger():
    return Case(Tagger(), (torch.randn(3, 7, 4), torch.tensor([7, 3, 5])))


def spectrogram():
    return Case(SpectrogramMask(), (torch.randn(3, 64),))


def residual(*, reentrant=False):
    return Case(Residual(reentrant=reentrant), (torch.randn(5, 6),))


def encoder():
    return Case(Encoder(), (torch.randn(3, 5, 8),), forward="extract_features")


def nested():
    return Case(Nested(), (torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged),))


def mixture():
    return Case(Mixture(), (torch.randn(4, 5),), loss=likelihood(torch.randn(4, 2)))


FAULTS = {}


def fault(make, **truth):
    def register(seed):
        FAULTS[seed.__name__] = (make, seed, truth)
        return seed

    return register


def squares(output):
    tensors = [output] if torch.is_tensor(output) else output.values() if isinstance(output, dict) else output
    return sum(each.abs().square().mean() for each in tensors if torch.is_tensor(each))


# -- weights -------------------------------------------------------------------------------------------------------------


@fault(language, origin="parameter", parameter="embedding.weight", module="embedding")
def tied_embedding_with_a_nan(case):
    case.model.embedding.weight.data[case.kwargs["input_ids"][0, 0]] = nan


@fault(language, origin="parameter", parameter="norms.1.weight", module="norms.1")
def one_inf_in_a_norm(case):
    case.model.norms[1].weight.data[2] = inf


@fault(language, origin="parameter", parameter="qkv.0.weight", module="qkv.0")
def a_flipped_exponent_bit(case):
    weight = case.model.qkv[0].weight.data
    weight[3, 3] = abs(weight[3, 3]) * 2.0**127 * 2
    weight[4, 3] = weight[3, 3] = 3.3e38


@fault(tcn, origin="parameter", parameter="encoder.weight", module="encoder")
def a_variance_that_overflows_in_the_next_module(case):
    case.model.encoder.weight.data[2, 0, 1] = 3e25


@fault(tagger, origin="parameter", parameter="lstm.weight_hh_l0", module="lstm")
def a_nan_inside_of_the_lstm(case):
    case.model.lstm.weight_hh_l0.data[5, 2] = nan


@fault(residual, origin="parameter", parameter="code", module="")
def a_weight_that_is_used_functionally(case):
    case.model.code.data[3] = nan


@fault(residual, origin="parameter", parameter="block.2.bias", module="block.2")
def a_weight_inside_of_a_checkpoint(case):
    case.model.block[2].bias.data[0] = inf


@fault(encoder, origin="parameter", parameter="layers.layers.1.self_attn.out_proj.weight")
def a_weight_of_a_module_that_is_never_called(case):
    case.model.layers.layers[1].self_attn.out_proj.weight.data[1, 1] = nan


@fault(nested, origin="parameter", parameter="linear.bias", module="linear")
def a_weight_under_a_nested_tensor(case):
    case.model.linear.bias.data[1] = nan


@fault(mixture, origin="parameter", parameter="log_variance.weight")
def an_absurd_log_variance(case):
    case.model.log_variance.weight.data[0, 0] = 1e30


# -- state ---------------------------------------------------------------------------------------------------------------


@fault(residual, origin="buffer", parameter="norm.running_var", module="norm")
def poisoned_statistics_in_eval(case):
    case.model.eval()
    case.model.norm.running_var[4] = nan


@fault(residual, origin="buffer", parameter="norm.running_mean", module="norm")
def poisoned_statistics_while_the_output_is_clean(case):
    case.model.norm.running_mean[1] = nan


@fault(residual, origin="buffer", parameter="level", module="")
def a_poisoned_average_that_is_a_plain_attribute(case):
    case.model.level[2] = nan


# -- input ---------------------------------------------------------------------------------------------------------------


@fault(tcn, origin="input", samples=(1,))
def one_nan_sample(case):
    case.args[0][1, 7] = nan


@fault(tagger, origin="input", samples=(2,))
def inf_in_a_valid_frame(case):
    case.args[0][2, 1, 0] = inf


@fault(spectrogram, origin="input", samples=(0, 2))
def nan_in_two_waveforms(case):
    case.args[0][0, 3] = case.args[0][2, 60] = nan


@fault(language, origin="input", samples=(0,))
def a_nan_in_a_float_mask(case):
    case.kwargs["attention_mask"] = torch.zeros(3, 1, 5)
    case.kwargs["attention_mask"][0, 0, 0] = nan


@fault(nested, origin="input", samples=(1,))
def a_nan_in_a_nested_tensor(case):
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    parts[1][0, 0] = nan
    case.args = (torch.nested.nested_tensor(parts, layout=torch.jagged),)


# -- operations ----------------------------------------------------------------------------------------------------------


@fault(tcn, origin="operation", operation="aten.div", module="", samples=(2,), line="x / x.std(")
def silence_divided_by_its_level(case):
    case.args[0][2] = 0


@fault(tcn, origin="operation", operation="aten.exp_", module="", line=".exp_()")
def an_exponential_in_place_on_a_view(case):
    case.model.gain = 1e4


@fault(tcn, origin="operation", module="blocks.1.parametrizations.weight.0")
def weight_norm_of_a_zero_direction(case):
    case.model.blocks[1].parametrizations.weight.original1.data[3] = 0


@fault(language, origin="operation", operation="aten._softmax", module="", samples=(1,), line="torch.softmax(")
def a_row_that_two_masks_hide_together(case):
    case.kwargs["attention_mask"] = torch.zeros(3, 5, 5)
    case.kwargs["attention_mask"][1, 2, :3] = -inf


@fault(language, origin="operation", operation="aten.div", module="", line="q @ k.mT /")
def a_temperature_of_zero(case):
    case.model.temperature = 0.0


@fault(tagger, origin="operation", operation="aten.div", module="", samples=(1,), line="/ lengths[:, None]")
def a_mean_over_no_frames(case):
    class ZeroLength(Tagger):
        def forward(self, x, lengths):
            return super().forward(x, lengths.clamp(min=1))[0] / lengths[:, None]

    case.model = ZeroLength()
    case.model.out.bias.data.fill_(1.0)
    case.args[1][1] = 0


@fault(spectrogram, origin="operation", operation="aten.log10", module="", samples=(1,), line="torch.log10")
def decibels_of_silence(case):
    case.model.floor = 0.0
    case.args[0][1] = 0


@fault(encoder, origin="operation", operation="aten.mul", module="", line="x * 2**15")
def a_front_end_in_half_precision(case):
    case.model.half()
    case.args = (case.args[0].half() * 3,)


@fault(encoder, origin="operation", operation="aten.mm", module="", line="scaled @ torch.ones")
def the_front_end_under_autocast(case):
    case.args = (case.args[0].abs() * 0.5,)
    case.context = torch.autocast("cpu", dtype=torch.float16)


@fault(encoder, origin="operation", operation="aten._softmax", module="layers.layers.0.self_attn", samples=(1,))
def a_sequence_of_padding_only(case):
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1] = True
    case.kwargs["padding_mask"] = padding
    for layer in case.model.layers.layers:
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, attend=attend, **k: attend(*a, **{**k, "need_weights": True})


@fault(nested, origin="operation", operation="aten.log", module="")
def a_logarithm_over_a_nested_tensor(case):
    class Log(Nested):
        def forward(self, x):
            return torch.log(self.linear(x) - 100)

    case.model = Log()


@fault(residual, origin="operation", operation="aten.div", module="", line="/ self.level")
def a_division_by_a_zero_attribute(case):
    case.model.level[1] = 0


# -- loss and backward ---------------------------------------------------------------------------------------------------


@fault(mixture, origin="loss", operation="aten.log", module="", line="-out[0].exp()")
def a_logarithm_of_something_negative(case):
    case.loss = lambda out: torch.log(-out[0].exp()).mean()


@fault(mixture, origin="loss", module="")
def a_target_with_a_nan(case):
    target = torch.randn(4, 2)
    target[3, 0] = nan
    case.loss = likelihood(target)


@fault(language, origin="loss", module="", line="F.cross_entropy")
def a_cross_entropy_without_targets(case):
    case.loss = lambda out: F.cross_entropy(out["logits"].flatten(0, 1), torch.full((15,), -100))


@fault(tcn, origin="backward", operation="aten.sqrt", module="", line=".sqrt()")
def a_norm_of_nothing_in_the_loss(case):
    case.loss = lambda out: (out - out).square().sum((1, 2, 3)).sqrt().mean()


@fault(residual, origin="backward", operation="aten.sqrt", module="", line="torch.sqrt(y)")
def a_where_around_a_sqrt(case):
    class Where(Residual):
        def forward(self, x):
            y = super().forward(x).relu() * 0
            return torch.where(y > 0, torch.sqrt(y), 0.0)

    case.model, case.loss = Where(), squares


@fault(lambda: residual(reentrant=True), origin="backward", operation="aten.pow", module="block.1")
def a_slope_inside_of_a_checkpoint(case):
    class Root(nn.Module):
        def forward(self, x):
            return (x * 0).abs() ** 0.5

    case.model.block[1] = Root()
    case.loss = squares


@fault(tagger, origin="backward", parameter="out.weight")
def a_gradient_that_a_hook_spoils(case):
    case.model.out.weight.register_hook(lambda grad: grad / 0)
    case.loss = squares


@fault(spectrogram, origin="backward", operation="aten.sqrt", module="net.1")
def a_slope_in_a_submodule(case):
    class Root(nn.Module):
        def forward(self, x):
            return torch.sqrt(x * 0)

    case.model.net[1] = Root()
    case.loss = squares


# -- two things at once --------------------------------------------------------------------------------------------------


@fault(tagger, origin="operation", operation="aten.log", module="", line="torch.log(y - 100)")
def a_healed_nan_of_the_input_beside_a_real_fault(case):
    class Healed(Tagger):
        def forward(self, x, lengths):
            y = super().forward(torch.nan_to_num(x), lengths)[0]
            return torch.log(y - 100) + torch.where(x.isnan(), 0.0, x).mean()

    case.model = Healed()
    case.args[0][0, 0, 0] = nan


@fault(mixture, origin="operation", operation="aten.sqrt", module="", line="real = torch.sqrt")
def two_births_of_which_one_is_removed_later(case):
    class Two(Mixture):
        def forward(self, x):
            removed = torch.log(x.relu() * 0)
            real = torch.sqrt(x - 50)
            both = torch.stack([removed, real])
            return both[1] + torch.where(torch.isinf(both[0]), 0.0, both[0])

    case.model, case.loss = Two(), None


@pytest.mark.parametrize("name", FAULTS)
def test_the_culprit_is_named(name):
    torch.manual_seed(0)
    make, seed, truth = FAULTS[name]
    case = make()
    seed(case)
    before = copy.deepcopy(case.model.state_dict())
    report = case.audit()
    assert not report.ok
    truth = dict(truth)
    assert truth.pop("line", "") in report.source
    assert {key: getattr(report, key) for key in truth} == truth
    after = case.model.state_dict()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
    assert not any(module._forward_hooks for module in case.model.modules())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "make", [language, tcn, tagger, spectrogram, residual, encoder, nested, mixture], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_healthy_model_has_no_finding(make, train, dtype):
    torch.manual_seed(0)
    case = make()
    case.model.train(train)
    if dtype is None:
        case.loss = case.loss or (squares if make is not nested else None)
    elif make in (spectrogram, nested):
        pytest.skip("torch has no such operation in bfloat16")
    else:
        case.context = torch.autocast("cpu", dtype=dtype)
    report = case.audit()
    assert report.findings == (), str(report)


def test_a_checkpoint_that_runs_twice_is_healthy():
    case = residual(reentrant=True)
    case.args[0].requires_grad_()
    case.loss = squares
    assert case.audit().ok
