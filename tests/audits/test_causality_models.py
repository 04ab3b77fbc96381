"""Models that the causality audit was not designed for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stethoscope.audits import causality

torch.set_num_threads(1)


def noise(*shape, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), **options)


class Gated(nn.Module):
    """WaveNet: padded on both sides, trimmed at the end."""

    def __init__(self, dilation):
        super().__init__()
        self.filter = nn.Conv1d(4, 4, 2, dilation=dilation, padding=dilation)
        self.gate = nn.Conv1d(4, 4, 2, dilation=dilation, padding=dilation)

    def forward(self, x):
        steps = x.size(-1)
        return x + torch.tanh(self.filter(x)[..., :steps]) * torch.sigmoid(self.gate(x)[..., :steps])


class KeyValueCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.cache = None

    def forward(self, x):
        self.cache, out = [], []
        for t in range(x.size(1)):
            q, k, v = self.qkv(x[:, t : t + 1]).chunk(3, -1)
            self.cache.append((k, v))
            keys, values = (torch.cat(one, 1) for one in zip(*self.cache, strict=True))
            out.append(torch.softmax(q @ keys.transpose(1, 2), -1) @ values)
        return torch.cat(out, 1)


class SelectiveScan(nn.Module):
    def __init__(self):
        super().__init__()
        self.decay, self.drive = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        decay = F.logsigmoid(self.decay(x)).cumsum(1)
        return torch.exp(decay) * (torch.exp(-decay) * self.drive(x)).cumsum(1)


class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        out, mean = [], self.mean.expand(x.size(0), 4)
        for t in range(x.size(-1)):
            mean = 0.9 * mean + 0.1 * x[..., t]
            out.append(x[..., t] - mean)
        self.mean = mean.mean(0).detach()
        return torch.stack(out, -1)


class CausalEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype)
        return self.inner(x, mask=mask, is_causal=True)


class CausalDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype)
        return self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)


class StateSpace(nn.Module):
    """An FFT convolution that insists on float32, then a norm: rounding without a float64 run to check it."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(noise(4, 500) * torch.exp(-torch.arange(500) / 30.0))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        steps = x.size(-1)
        spectrum = torch.fft.rfft(x.float(), 2 * steps) * torch.fft.rfft(self.kernel[:, :steps].float(), 2 * steps)
        return self.norm(torch.fft.irfft(spectrum, 2 * steps)[..., :steps].to(x.dtype).transpose(1, 2))


class GrowsItsKernel(nn.Module):
    """Writes into its own parameter and buffer when it first sees a length, as S4 does."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 1))
        self.register_buffer("length", torch.tensor(1))

    def forward(self, x):
        if int(self.length) < x.size(-1):
            with torch.no_grad():
                self.kernel.mul_(0.5)
                self.length += x.size(-1)
        return (x * self.kernel).cumsum(-1)


@pytest.mark.parametrize(
    ("build", "x", "options"),
    [
        pytest.param(lambda: nn.Sequential(Gated(2), Gated(4)), noise(2, 4, 150), {}, id="gated convolutions"),
        pytest.param(KeyValueCache, noise(2, 30, 8), {"time_axis": 1}, id="key-value cache"),
        pytest.param(SelectiveScan, noise(2, 30, 6), {"time_axis": 1}, id="selective scan"),
        pytest.param(RunningMean, noise(2, 4, 40), {}, id="running mean in a buffer"),
        pytest.param(CausalEncoder, noise(3, 30, 8), {"time_axis": 1}, id="transformer encoder"),
        pytest.param(CausalDecoder, (noise(2, 30, 8), noise(2, 17, 8)), {"time_axis": 1}, id="decoder with memory"),
        pytest.param(StateSpace, noise(2, 4, 500), {"out_time_axis": 1}, id="float32 FFT and a norm"),
        pytest.param(GrowsItsKernel, noise(2, 4, 60), {}, id="parameter written in forward"),
        pytest.param(lambda: nn.Conv2d(1, 4, (1, 3), padding=(0, 1)), noise(2, 1, 50, 16), {"time_axis": 2}, id="2-D"),
        pytest.param(lambda: nn.Linear(8, 8).bfloat16(), noise(2, 60, 8).bfloat16(), {"time_axis": 1}, id="bfloat16"),
        pytest.param(lambda: lambda x: x.cumsum(0), noise(60), {"time_axis": 0}, id="one axis"),
        pytest.param(lambda: lambda x: (x > 0).cummax(-1).values, noise(2, 60), {}, id="a mask as the output"),
    ],
)
def test_unforeseen_causal_models_are_causal(build, x, options):
    torch.manual_seed(0)
    report = causality(build(), x, **options)
    assert report.causal, report


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.mix = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.mix(self.pool(x)))


class DualPath(nn.Module):
    def __init__(self, *, both_ways):
        super().__init__()
        self.intra = nn.LSTM(4, 2, batch_first=True, bidirectional=True)
        self.inter = nn.LSTM(4, 2 if both_ways else 4, batch_first=True, bidirectional=both_ways)

    def forward(self, x):
        batch, channels, steps = x.shape
        segments = steps // 10
        y = x.reshape(batch, channels, segments, 10).permute(0, 2, 3, 1)
        y = self.intra(y.reshape(-1, 10, channels))[0].reshape(batch, segments, 10, channels).permute(0, 2, 1, 3)
        y = self.inter(y.reshape(-1, segments, channels))[0].reshape(batch, 10, segments, channels)
        return y.permute(0, 3, 2, 1).reshape(batch, channels, steps)


class Edges(nn.Module):
    """The last step of each block of 25 sees the first of the next."""

    def forward(self, x):
        y, at = x.clone(), torch.arange(24, x.size(-1) - 1, 25)
        y[..., at] += x[..., at + 1]
        return y


def block_attention(x):
    """Blocks of 8 steps that see 4 more."""
    at = torch.arange(x.size(1))
    seen = at[None, :] < (at[:, None] // 8 + 1) * 8 + 4
    return torch.softmax((x @ x.transpose(1, 2)).masked_fill(~seen, -1e9), -1) @ x


def inside(*modules):
    return lambda: nn.Sequential(nn.Conv1d(4, 4, 1), *(module() for module in modules))


class Shift(nn.Module):
    def forward(self, x):
        return F.pad(x[..., 3:], (0, 3))


class Roll(nn.Module):
    def forward(self, x):
        return x.roll(1, -1)


@pytest.mark.parametrize(
    ("build", "x", "options", "ahead", "culprit"),
    [
        pytest.param(inside(lambda: nn.InstanceNorm1d(4)), noise(2, 4, 90), {}, 89, "1", id="InstanceNorm"),
        pytest.param(inside(lambda: nn.Softmax(-1)), noise(2, 4, 60), {}, 59, "1", id="softmax over time"),
        pytest.param(inside(Squeeze), noise(2, 4, 90), {}, 89, "1", id="squeeze and excite"),
        pytest.param(inside(Shift), noise(2, 4, 90), {}, 3, "1", id="shift"),
        pytest.param(inside(Roll), noise(2, 4, 90), {}, 89, "1", id="the first step sees the last"),
        pytest.param(Edges, noise(2, 4, 400), {}, 1, "", id="block edges"),
        pytest.param(lambda: block_attention, noise(2, 100, 8), {"time_axis": 1}, 11, None, id="blocks that see more"),
        pytest.param(lambda: DualPath(both_ways=False), noise(2, 4, 200), {}, 9, "", id="dual path"),
        pytest.param(
            lambda: nn.TransformerEncoderLayer(8, 2, 16),
            noise(30, 3, 8),
            {"time_axis": 0},
            29,
            "self_attn",
            id="time first",
        ),
        pytest.param(
            lambda: torch.compile(inside(lambda: nn.GroupNorm(1, 4))(), backend="eager"),
            noise(2, 4, 60),
            {},
            59,
            "1",
            id="compiled",
        ),
        pytest.param(
            inside(lambda: nn.LayerNorm([4, 90])), noise(2, 4, 90), {"out_time_axis": -1}, 89, "1", id="one length only"
        ),
        pytest.param(
            lambda: nn.Conv1d(4, 4, 3, padding=1).bfloat16(), noise(2, 4, 60).bfloat16(), {}, 1, "", id="bfloat16"
        ),
        pytest.param(lambda: nn.Conv1d(4, 4, 3, padding=1), noise(4, 60), {}, 1, "", id="no batch"),
        pytest.param(lambda: nn.AvgPool1d(4), noise(2, 4, 90), {}, 3, "", id="pooling with a stride"),
    ],
)
def test_unforeseen_leaks_are_measured_and_named(build, x, options, ahead, culprit):
    torch.manual_seed(0)
    report = causality(build(), x, **options)
    assert report.lookahead == ahead, report
    assert report.culprit == culprit, report


def test_a_bidirectional_path_over_segments_is_seen_through_the_folding():
    torch.manual_seed(0)
    report = causality(DualPath(both_ways=True), noise(2, 4, 100))
    assert report.lookahead == 99
    assert report.culprit == "inter"


def test_a_spectrogram_model_looks_ahead_by_the_part_of_its_window_that_is_not_behind():
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(33, 33, batch_first=True)

        def forward(self, x):
            window = torch.hamming_window(64, dtype=x.dtype)
            frames = torch.stft(F.pad(x, (48, 0)), 64, 16, window=window, return_complex=True, center=False)
            return frames * torch.sigmoid(self.rnn(frames.abs().transpose(1, 2))[0]).transpose(1, 2)

    report = causality(Masks(), noise(2, 1600), allowed=15)
    assert report.ok
    assert report.lookahead == 15


def test_where_the_look_ahead_occurs_is_told():
    assert causality(Edges(), noise(2, 4, 400)).per_mode["eval"].where == "at block edges"
    assert causality(Shift(), noise(2, 4, 90)).per_mode["eval"].where == "everywhere"
    start = causality(lambda x: x + F.pad(x[..., 1:6], (0, x.size(-1) - 5)), noise(2, 4, 90))
    assert start.per_mode["eval"].where == "at the start"


def test_an_isolated_coupling_is_found_where_the_budget_allows_to_look_everywhere():
    def once(x):
        y = x.clone()
        y[..., 137] += x[..., 138]
        return y

    assert causality(once, noise(2, 4, 400), modes=("eval",), budget=500).lookahead == 1


def test_second_opinions_that_differ_are_explained():
    def attention(x):
        steps = torch.ones(x.size(1), x.size(1), dtype=x.dtype).tril()
        return steps @ x

    report = causality(attention, noise(2, 50, 4), time_axis=1)
    assert report.causal
    assert report.per_mode["eval"].nan_leak is True
    assert "0 * NaN" in str(report)
    report = causality(lambda x: x - x.mean(-1, keepdim=True).detach(), noise(2, 4, 50))
    assert report.per_mode["eval"].gradient_leak is False
    assert "detached" in str(report)
    report = causality(lambda x: x + x.nan_to_num().mean(-1, keepdim=True), noise(2, 4, 50))
    assert report.per_mode["eval"].nan_leak is False
    assert "nan_to_num" in str(report)


def test_the_picture_shows_which_outputs_move_too_early():
    report = causality(nn.Sequential(nn.Conv1d(4, 4, 21, padding=10)), noise(2, 4, 60))
    rows = dict(line.split() for line in report.plot(width=60).splitlines())
    assert rows["30"] == "." * 20 + "!" * 10 + "#" * 11 + "." * 19
    assert all(line in str(report) for line in report.plot().splitlines())


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.integers(1, 7),
    dilation=st.integers(1, 4),
    ahead=st.integers(0, 12),
    steps=st.integers(60, 200),
    batch=st.integers(1, 3),
)
def test_right_padding_is_the_look_ahead_for_any_kernel(kernel, dilation, ahead, steps, batch):
    torch.manual_seed(0)
    reach = (kernel - 1) * dilation
    right = min(ahead, reach) // dilation * dilation
    conv = nn.Conv1d(2, 3, kernel, dilation=dilation)
    report = causality(lambda x: conv(F.pad(x, (reach - right, right))), noise(batch, 2, steps), modes=("eval",))
    assert report.lookahead == right
