import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stethoscope.audits import causality

torch.set_num_threads(1)


def noise(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


class CausalConv(nn.Module):
    def __init__(self, channels=4, kernel=3, dilation=1):
        super().__init__()
        self.pad = (kernel - 1) * dilation
        self.conv = nn.Conv1d(channels, channels, kernel, dilation=dilation)

    def forward(self, x):
        return self.conv(F.pad(x, (self.pad, 0)))


class CumulativeNorm(nn.Module):
    def forward(self, x):
        count = x.size(1) * torch.arange(1, x.size(-1) + 1, dtype=x.dtype)
        mean = x.sum(1, keepdim=True).cumsum(-1) / count
        power = x.square().sum(1, keepdim=True).cumsum(-1) / count
        return (x - mean) / (power - mean.square() + 1e-4).sqrt()


class Attention(nn.Module):
    def __init__(self, *, masked):
        super().__init__()
        self.masked = masked
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), dtype=x.dtype) if self.masked else None
        return self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]


class SDPA(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class PackedLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.size(1))[0]


class ChunkedAttention(nn.Module):
    def __init__(self, chunk):
        super().__init__()
        self.chunk = chunk
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        block = torch.arange(x.size(1)) // self.chunk
        return self.inner(x, x, x, attn_mask=block[:, None] < block[None, :], need_weights=False)[0]


def fft_convolution(x, kernel=None):
    kernel = noise(64, seed=5) * 0.9 ** torch.arange(64) if kernel is None else kernel
    size = x.size(-1) + kernel.size(-1)
    spectrum = torch.fft.rfft(x, size) * torch.fft.rfft(kernel.to(x.dtype), size)
    return torch.fft.irfft(spectrum, size)[..., : x.size(-1)]


# --- no false alarm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "x", "options"),
    [
        pytest.param(CausalConv(), noise(2, 4, 200), {}, id="left-padded convolution"),
        pytest.param(nn.Sequential(CausalConv(dilation=1), CausalConv(dilation=4)), noise(3, 4, 200), {}, id="dilated"),
        pytest.param(Attention(masked=True), noise(2, 60, 8), {"time_axis": 1}, id="masked attention"),
        pytest.param(SDPA(), noise(2, 700, 8), {"time_axis": 1}, id="long SDPA"),
        pytest.param(fft_convolution, noise(2, 4, 3000), {}, id="FFT convolution"),
        pytest.param(CumulativeNorm(), noise(2, 4, 300), {}, id="cumulative norm"),
        pytest.param(nn.LSTM(4, 8, 2, batch_first=True, dropout=0.3), noise(3, 50, 4), {"time_axis": 1}, id="LSTM"),
        pytest.param(nn.GRU(4, 8), noise(50, 3, 4), {"time_axis": 0}, id="GRU, time first"),
        pytest.param(
            PackedLSTM(), noise(3, 40, 4), {"time_axis": 1, "lengths": torch.tensor([40, 30, 12])}, id="packed LSTM"
        ),
        pytest.param(nn.Sequential(nn.Dropout(0.5), CausalConv()), noise(2, 4, 100), {}, id="dropout in train mode"),
        pytest.param(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)), noise(2, 40, 8), {"time_axis": 1}, id="LayerNorm"
        ),
    ],
)
def test_causal_models_are_causal_in_both_modes(model, x, options):
    torch.manual_seed(0)
    report = causality(model, x, **options)
    assert report.causal, report
    assert report.ok
    assert report.lookahead == 0
    assert report.culprit is None
    assert not report.batch_leak
    assert set(report.per_mode) == {"eval", "train"}


def test_chunked_attention_looks_ahead_by_chunk_minus_one():
    report = causality(ChunkedAttention(16), noise(2, 128, 8), time_axis=1, allowed=15)
    assert report.ok, report
    assert report.lookahead == 15
    assert not report.causal
    assert not causality(ChunkedAttention(16), noise(2, 128, 8), time_axis=1, allowed=14).ok


def test_constants_beside_any_module_are_widened_for_the_decision_in_float64():
    filter_ = noise(64)

    def convolve(x):
        size = x.size(-1) + 63
        return torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(filter_, size), size)[..., : x.size(-1)]

    def leak(x):
        out = torch.zeros(x.shape)
        out.narrow(-1, 0, 50).copy_(x[..., :50])
        out[..., 50:] += x[..., 50:]
        return out + 1e-8 * x.roll(-2, -1)

    report = causality(convolve, noise(2, 4, 200))
    assert (report.lookahead, report.ok) == (0, True)
    report = causality(leak, noise(2, 4, 200))
    assert (report.lookahead, report.per_mode["eval"].dtype) == (2, "float64")


def test_a_rounding_behind_an_fft_convolution_makes_no_leak_of_a_last_bit():
    x = noise(2, 4, 4000)
    assert causality(lambda x: (100 * fft_convolution(x)).round(), x).ok
    ahead = causality(lambda x: (100 * fft_convolution(x).roll(-2, -1)).round(), x, modes="eval")
    assert ahead.lookahead == 2


def test_fft_convolution_before_a_norm_is_causal():
    class Model(nn.Module):
        def forward(self, x):
            y = fft_convolution(x)
            return y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()

    assert causality(Model(), noise(2, 4, 2000)).causal


# --- no miss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leak",
    [
        pytest.param(lambda x: x - x.mean(-1, keepdim=True).detach(), id="detached mean"),
        pytest.param(lambda x: x + x.argmax(-1, keepdim=True) / 100, id="argmax over time"),
        pytest.param(lambda x: x + x.sort(-1).values, id="sort over time"),
        pytest.param(lambda x: x + x.flip(-1).cummax(-1).values.flip(-1), id="maximum over the future"),
        pytest.param(lambda x: x * (x[..., -1:] > 4.0), id="gate on a large future value"),
        pytest.param(lambda x: x * (x[..., -1:] > -6.0), id="gate on a negative future value"),
        pytest.param(lambda x: x + torch.nan_to_num(x).mean(-1, keepdim=True), id="nan_to_num"),
        pytest.param(lambda x: x / x.std(-1, keepdim=True), id="std of the clip"),
        pytest.param(lambda x: x + 1e-3 * x.mean(-1, keepdim=True), id="small coupling"),
    ],
)
def test_leaks_over_everything_are_found(leak):
    report = causality(leak, noise(2, 4, 150))
    assert not report.ok
    assert report.lookahead == 149, report


def test_a_gate_on_loud_future_values_looks_ahead_everywhere():
    report = causality(lambda x: x * (1 + (F.pad(x, (0, 7))[..., 7:] > 9)), noise(2, 4, 200), modes="eval")
    assert report.lookahead == 7
    assert report.per_mode["eval"].where == "everywhere"


def test_outputs_that_become_or_cease_to_be_finite_hide_no_leak():
    x = torch.cat([noise(2, 4, 200), torch.zeros(2, 4, 10)], -1)
    report = causality(lambda x: x.abs().log().roll(-2, -1), x)
    assert report.lookahead == 2
    assert causality(lambda x: x.abs().log().cumsum(-1), x).ok

    def across_items(x):
        rest = x - x.mean(0, keepdim=True)
        return torch.where(rest > 0, rest, torch.nan)

    assert causality(across_items, noise(2, 4, 200)).batch_leak


def test_a_tiny_coupling_is_found_and_its_size_is_reported():
    report = causality(lambda x: x.cumsum(-1) + 1e-7 * x.sum(-1, keepdim=True), noise(2, 4, 100))
    assert report.lookahead == 99, report
    assert report.per_mode["eval"].dtype == "float64"
    assert 1e-9 < report.per_mode["eval"].size < 1e-6


@pytest.mark.parametrize(("mode", "ahead"), [("reflect", 6), ("circular", 199)])
def test_padding_that_leaks_only_at_the_start_is_found(mode, ahead):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 7)

        def forward(self, x):
            return self.conv(F.pad(x, (6, 0), mode=mode))

    report = causality(Padded(), noise(2, 4, 200))
    assert report.lookahead == ahead, report
    if mode == "reflect":
        assert report.per_mode["eval"].where == "at the start"
        assert report.culprit == ""
        assert "pad" in report.findings[0].evidence["operation"]


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_a_shift_is_measured(shift):
    report = causality(lambda x: F.pad(x, (0, shift))[..., shift:], noise(2, 3, 120))
    assert report.lookahead == shift


# --- strides and windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "hop"), [(16, 8), (10, 5), (400, 160), (7, 7), (20, 13), (3, 1)])
def test_an_encoder_looks_ahead_by_its_window_minus_one(window, hop):
    report = causality(nn.Conv1d(1, 4, window, stride=hop), noise(2, 1, 4000), allowed=window - 1)
    assert report.lookahead == window - 1, report
    assert report.ok


def test_encoder_and_decoder_together_look_ahead_by_the_window_minus_one():
    model = nn.Sequential(nn.Conv1d(1, 4, 16, stride=8), nn.ConvTranspose1d(4, 1, 16, stride=8))
    report = causality(model, noise(2, 1, 800), allowed=15, sample_rate=8000)
    assert report.lookahead == 15
    assert report.ok
    assert report.lookahead_ms == pytest.approx(1.875)


def test_upsampling_by_repetition_is_causal_and_linear_interpolation_is_not():
    assert causality(nn.Upsample(scale_factor=3), noise(2, 4, 100)).causal
    linear = nn.Upsample(scale_factor=2, mode="linear")
    assert causality(linear, noise(2, 4, 100)).lookahead == 1


def test_output_padded_to_whole_blocks_is_causal():
    class Blocks(nn.Module):
        def forward(self, x):
            return F.pad(x, (0, -x.size(-1) % 100)).cumsum(-1)

    assert causality(Blocks(), noise(2, 4, 777)).causal


def test_a_complex_spectrogram_is_judged():
    report = causality(lambda x: x.cumsum(1), noise(2, 60, 9, dtype=torch.complex64), time_axis=1)
    assert report.causal
    report = causality(lambda x: x * x.abs().mean(1, keepdim=True), noise(2, 60, 9, dtype=torch.complex64), time_axis=1)
    assert report.lookahead == 59


def test_integer_inputs_are_judged_by_other_values_that_occur():
    class Tokens(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.rnn = nn.GRU(8, 8, batch_first=True, **options)

        def forward(self, ids):
            return self.rnn(self.embed(ids))[0]

    ids = torch.randint(0, 10, (2, 40), generator=torch.Generator().manual_seed(0))
    assert causality(Tokens(), ids).causal
    assert causality(Tokens(bidirectional=True), ids).culprit == "rnn"


# --- modes and batch ----------------------------------------------------------------------------------------------


def test_boolean_inputs_are_judged():
    x = noise(2, 60) > 0
    assert causality(lambda x: x.roll(-2, -1), x).lookahead == 2
    assert causality(lambda x: x.long().cumsum(-1), x).ok


def test_a_model_is_judged_within_inference_mode_unless_it_was_made_there():
    model = nn.BatchNorm1d(4)
    with torch.inference_mode():
        assert causality(model, noise(2, 4, 60), modes="train").lookahead == 59
        made_there = nn.BatchNorm1d(4)
        with pytest.raises(ValueError, match="inference_mode"):
            causality(made_there, noise(2, 4, 60))


def test_batchnorm_leaks_in_train_mode_over_time_and_batch_and_is_causal_in_eval_mode():
    model = nn.Sequential(CausalConv(), nn.BatchNorm1d(4))
    report = causality(model, noise(3, 4, 100))
    assert report.per_mode["eval"].ok
    assert report.per_mode["train"].lookahead == 99
    assert report.per_mode["train"].batch_leak
    assert report.culprit == "1"
    assert {f.code for f in report.findings} == {"causality-leak", "batch-leak"}
    assert all(f.module == "1" and f.phase == "train" for f in report.findings)
    assert causality(model, noise(3, 4, 100), modes=("eval",)).ok


def test_a_leak_across_the_batch_alone_is_told_from_one_over_time():
    report = causality(lambda x: x - x.mean(0, keepdim=True), noise(3, 4, 50))
    assert report.batch_leak
    assert report.causal
    assert not report.ok


def test_a_single_item_is_taken_twice_to_see_leaks_across_the_batch():
    assert causality(nn.BatchNorm1d(4), noise(1, 4, 50), modes=("train",)).batch_leak
    assert causality(CausalConv(), noise(1, 4, 50)).ok


def test_dependence_on_padding_beyond_lengths_is_reported():
    class Sums(nn.Module):
        def forward(self, x, lengths):
            inside = (torch.arange(x.size(1)) < lengths[:, None])[..., None]
            return (x * inside if self.masked else x).cumsum(1).flip(1)

    model = Sums()
    for masked in (True, False):
        model.masked = masked
        report = causality(model, noise(2, 40, 3), time_axis=1, allowed=39, lengths=torch.tensor([40, 20]))
        assert report.per_mode["eval"].padding_leak is False  # within the declared look-ahead

    class Mean(Sums):
        def forward(self, x, lengths):
            inside = (torch.arange(x.size(1)) < lengths[:, None])[..., None]
            return x - (x * inside if self.masked else x).mean(1, keepdim=True)

    model = Mean()
    for masked in (True, False):
        model.masked = masked
        report = causality(model, noise(2, 40, 3), time_axis=1, lengths=torch.tensor([40, 20]))
        assert report.per_mode["eval"].padding_leak is not masked


# --- culprit ------------------------------------------------------------------------------------------------------


def test_the_first_of_several_norms_is_named_with_type_and_advice():
    model = nn.Sequential(CausalConv(), nn.GroupNorm(1, 4), CausalConv(), nn.GroupNorm(1, 4))
    report = causality(model, noise(2, 4, 100))
    finding = report.findings[0]
    assert report.culprit == finding.module == "1"
    assert finding.evidence["type"] == "GroupNorm"
    assert finding.evidence["axis"] == 2
    assert finding.evidence["alike"] == ["3"]
    assert "cumulative" in finding.advice


def test_symmetric_padding_bidirectional_and_unmasked_attention_are_named():
    conv = nn.Sequential(CausalConv(), nn.Conv1d(4, 4, 5, padding=2))
    assert causality(conv, noise(2, 4, 60)).culprit == "1"
    assert "left" in causality(conv, noise(2, 4, 60)).findings[0].advice
    attention = nn.Sequential(nn.Linear(8, 8), Attention(masked=False))
    report = causality(attention, noise(2, 30, 8), time_axis=1)
    assert report.culprit == "1.inner"
    assert "mask" in report.findings[0].advice


def test_an_operation_outside_every_leaf_is_laid_at_the_enclosing_module_with_its_line():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = CausalConv()

        def forward(self, x):
            std = x.std(-1, keepdim=True)
            return self.conv(x / (std + 1e-3)) * std

    report = causality(nn.Sequential(CausalConv(), Normalised()), noise(2, 4, 80))
    assert report.culprit == "1"
    assert "x / (std + 1e-3)" in report.findings[0].evidence["source"]
    assert "x.std(" in report.findings[0].message


def test_a_look_ahead_that_a_later_delay_takes_back_accuses_nobody():
    class Delayed(nn.Module):
        def __init__(self):
            super().__init__()
            self.ahead = nn.Conv1d(4, 4, 5, padding=2)
            self.norm = nn.GroupNorm(1, 4)

        def forward(self, x):
            y = F.pad(self.ahead(x), (2, 0))[..., : x.size(-1)]
            return self.last(y)

    model = Delayed()
    model.last = lambda y: y
    assert causality(model, noise(2, 4, 80)).causal
    model.last = lambda y: model.norm(y)  # noqa: PLW0108  # plain assignment would register it a second time
    assert causality(model, noise(2, 4, 80)).culprit == "norm"


def test_index_buffers_of_packed_sequences_are_not_taken_for_statistics():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True, bidirectional=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.size(1))[0]

    lengths = torch.tensor([60, 40])
    finding = causality(Packed(), noise(2, 60, 4), time_axis=1, lengths=lengths, modes="eval").findings[0]
    assert "uses statistics" not in finding.message
    assert "backward direction" in finding.message
    assert finding.evidence["axis"] == "unknown"


def test_where_time_is_folded_the_enclosing_module_is_named_and_the_axis_is_unknown():
    class DualPath(nn.Module):
        def __init__(self):
            super().__init__()
            self.intra = nn.LSTM(4, 2, batch_first=True, bidirectional=True)

        def forward(self, x):
            chunks = x.transpose(1, 2).reshape(-1, 10, x.size(1))
            return self.intra(chunks)[0].reshape(x.size(0), -1, x.size(1)).transpose(1, 2)

    report = causality(nn.Sequential(CausalConv(), DualPath()), noise(2, 4, 400))
    assert report.lookahead == 9
    assert report.culprit == "1"
    assert report.findings[0].evidence["axis"] == "unknown"


# --- how to call --------------------------------------------------------------------------------------------------


def test_methods_functions_several_inputs_and_parts_of_the_output_are_taken():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(1, 4)

        def extract(self, x, y):
            return {"good": [x.cumsum(-1) + y], "bad": self.norm(x)}

    model, pair = Model(), (noise(2, 4, 60), noise(2, 4, 60, seed=1))
    assert causality(model, pair, forward="extract", output="bad").culprit == "norm"
    assert causality(model, pair, forward="extract", output=("good", 0)).ok
    assert causality(model, pair, forward="extract").lookahead == 59
    assert causality(model.extract, pair).culprit == "norm"
    assert causality(model, pair, forward=lambda m, x, y: m.extract(x, y)["bad"]).culprit == "norm"
    assert causality(lambda x, y: model.extract(x, y)["bad"], pair).culprit == "norm"
    second = causality(lambda x, y: x + y.flip(-1), pair)
    assert second.lookahead == 59


def test_a_budget_bounds_the_forward_passes():
    calls = 0

    def model(x):
        nonlocal calls
        calls += 1
        return x.cumsum(-1)

    report = causality(model, noise(2, 4, 5000), modes=("eval",), budget=24)
    assert calls == report.passes <= 24
    assert f"{calls} forward passes" in str(report)


@pytest.mark.parametrize("budget", [16, 20, 25, 31, 40, 60])
def test_any_budget_is_kept_and_still_finds_what_is_everywhere(budget):
    model = nn.Sequential(CausalConv(), nn.GroupNorm(1, 4))
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    handle = model.register_forward_hook(count)
    report = causality(model, noise(2, 4, 200), budget=budget)
    handle.remove()
    assert calls == report.passes <= budget
    assert report.lookahead == 199
    assert set(report.per_mode) == {"eval", "train"}
    assert causality(CausalConv(), noise(2, 4, 200), budget=budget).ok
    assert causality(fft_convolution, noise(2, 4, 200), budget=budget).passes <= budget


# --- left as it was -----------------------------------------------------------------------------------------------


def state(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),  # the generator that models draw from
        random.getstate(),
    )


def assert_same(a, b):
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1] == b[1]
    assert all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))
    assert a[3] == b[3]
    assert torch.equal(a[4], b[4])
    assert (a[5] == b[5]).all()
    assert a[6] == b[6]


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(CausalConv(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.GroupNorm(1, 4))
    model[1].eval()
    x = noise(2, 4, 60)
    model(x).sum().backward()
    before, given = state(model), x.clone()
    causality(model, x)
    assert_same(before, state(model))
    assert torch.equal(x, given)


def test_the_model_is_left_as_it_was_after_an_exception():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            y = self.norm(x)
            if self.calls > 12:
                raise RuntimeError("the disk is on fire")
            return F.dropout(y)

    model = Fails()
    before = state(model)
    with pytest.raises(RuntimeError, match="on fire"):
        causality(model, noise(2, 4, 60), modes=("train",))
    assert_same(before, state(model))


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_deterministic_is_refused_with_the_module_to_switch_off():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    with pytest.raises(ValueError, match=r"not deterministic in eval mode.*'1'.*switch off"):
        causality(nn.Sequential(CausalConv(), Noisy()), noise(2, 4, 60))

    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    with pytest.raises(ValueError, match="state"):
        causality(Counts(), noise(2, 4, 60), modes=("train",))


@pytest.mark.parametrize(
    ("model", "x", "options", "match"),
    [
        (nn.Conv1d(4, 4, 65), noise(2, 4, 60), {}, "receptive field"),
        (nn.Linear(8, 8), noise(2, 60, 8), {}, "time_axis"),
        (nn.Conv1d(4, 4, 1), noise(2, 4, 60), {"time_axis": 3}, "no axis 3"),
        (nn.Conv1d(4, 4, 1), noise(2, 4, 1), {}, "too few"),
        (nn.Conv1d(4, 4, 1), torch.zeros(0, 4, 60), {}, "holds nothing"),
        (lambda x, _: x, noise(2, 4, 60), {"lengths": torch.tensor([60])}, "one for each item"),
        (lambda x: {"a": x}, noise(2, 4, 60), {"output": "b"}, r"^output='b': the model's output has no 'b'"),
        (lambda x: x.mean(-1), noise(2, 4, 60), {}, "No output follows time"),
        (lambda x: x, noise(2, 4, 60).fill_(float("nan")), {}, "NaN"),
        (torch.zeros_like, noise(2, 4, 60), {}, "moved any output"),
        (lambda x: x, noise(2, 4, 60), {"allowed": -1}, "allowed"),
        (lambda x: x, noise(2, 4, 60), {"modes": ("test",)}, "modes"),
        (lambda x: x, noise(2, 4, 60), {"budget": 3}, "budget"),
        (lambda x: {"y": x}, noise(2, 4, 60), {"output": "z"}, "'y'"),
        (nn.Conv1d(4, 4, 1), noise(2, 4, 60), {"forward": "extract"}, "no method"),
        (lambda x: x, "x", {}, "tensor"),
        (nn.Embedding(3, 2), torch.zeros(2, 60, dtype=torch.long), {}, "alike"),
    ],
)
def test_bad_input_is_refused_with_what_is_wrong(model, x, options, match):
    with pytest.raises(ValueError, match=match):
        causality(model, x, **options)


def test_modules_behind_other_callables_are_found_and_left_as_they_were():
    class Pipeline:
        def __init__(self, net):
            self.net = net

        def __call__(self, x):
            return self.net(x)

    net = nn.Sequential(CausalConv(), nn.BatchNorm1d(4), nn.GroupNorm(1, 4))
    before, x = state(net), noise(2, 4, 60)
    for model in (
        Pipeline(net),
        Pipeline(net).__call__,
        functools.partial(lambda n, x: n(x), net),
        lambda x: net(x) * 1,
    ):
        report = causality(model, x, modes=("eval",))
        assert report.culprit == "2"
        assert not report.batch_leak
    assert_same(before, state(net))


def test_attributes_that_a_model_keeps_between_calls_are_set_back():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = None

        def forward(self, x):
            self.hidden = x[..., -1]
            return x.cumsum(-1)

    model = Keeps()
    causality(model, noise(2, 4, 60))
    assert model.hidden is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_model_is_judged():
    model = torch.jit.script(nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(1, 4)))
    assert causality(model, noise(2, 4, 60)).lookahead == 59


def test_a_model_that_takes_certain_lengths_only_is_judged():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 100, 100)

        def forward(self, x):
            assert x.size(-1) % 100 == 0
            return self.conv(x)

    assert causality(Blocks(), noise(2, 1, 2000), allowed=99).lookahead == 99


def test_autocast_hides_neither_leak_nor_causality():
    symmetric, plain = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3)

    def cast(forward):
        def call(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return forward(x)

        return call

    assert causality(cast(symmetric), noise(2, 4, 60)).lookahead == 1
    assert causality(cast(lambda x: plain(F.pad(x, (2, 0)))), noise(2, 4, 60)).causal


def test_kernel_masks_make_a_convolution_causal():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(4, 4, 7))
            self.register_buffer("mask", (torch.arange(7) <= 3).float())

        def forward(self, x):
            return F.conv1d(x, self.weight * self.mask, padding=3)

    assert causality(Masked(), noise(2, 4, 90)).causal
    assert causality(nn.MaxPool1d(3, 1, 1), noise(2, 4, 90)).lookahead == 1


def test_time_folded_with_the_batch_in_the_output_is_refused():
    with pytest.raises(ValueError, match="No output follows time"):
        causality(lambda x: x.reshape(-1, 4), noise(2, 60, 4), time_axis=1)
