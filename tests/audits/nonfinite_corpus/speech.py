"""A CTC recogniser: log-mel features, normalisation per utterance, SpecAugment, strided convolution, self-attention."""

import torch
from torch import nn
from torch.nn import functional as F

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")


class LogMel(nn.Module):
    def __init__(self, floor):
        super().__init__()
        self.register_buffer("filters", torch.rand(8, 16))
        self.floor = floor

    def forward(self, power):
        return torch.log(power @ self.filters.t() + self.floor)


class Normalise(nn.Module):
    """Mean and standard deviation of each utterance's own frames."""

    def forward(self, features, lengths):
        rows = []
        for frames, length in zip(features, lengths, strict=True):
            voiced = frames[:length]
            rows.append((frames - voiced.mean(0)) / (voiced.std(0) + 1e-5))
        return torch.stack(rows)


class Augment(nn.Module):
    """Fills a band with the mean of what is quieter than `level`."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, features):
        features = features.clone()
        quiet = features[features < self.level]
        features[:, :, 2:4] = quiet.mean()
        return features


class Recogniser(nn.Module):
    def __init__(self, floor=1e-6, level=0.0, letters=6):
        super().__init__()
        self.frontend, self.normalise, self.augment = LogMel(floor), Normalise(), Augment(level)
        self.conv = nn.Conv1d(8, 8, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, letters)

    def forward(self, power, lengths, padding=None):
        x = self.augment(self.normalise(self.frontend(power), lengths))
        x = F.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=padding)[0])
        return self.head(x).log_softmax(-1)


LENGTHS = (12, 10, 8)


def power():
    return torch.rand(3, 12, 16)


def ctc(targets=3, clean=False):
    lengths = torch.full((3,), targets)

    def loss(out):
        frames = torch.full((3,), out.shape[1])
        letters = torch.ones(3, targets, dtype=torch.long)
        return F.ctc_loss(out.transpose(0, 1), letters, frames, lengths, zero_infinity=clean)

    return loss


@fault("loss", "", "_ctc_loss", "F.ctc_loss", first_nan="-")
def transcript_longer_than_its_frames():
    return Run(Recogniser(), (power(), LENGTHS), loss=ctc(targets=6))


@fault("operation", "frontend", "log", "torch.log", samples=(1,), first_inf="frontend", first_nan="normalise")
def logarithm_of_digital_silence():
    x = power()
    x[1, 7:9] = 0
    return Run(Recogniser(floor=0.0), (x, LENGTHS), loss=ctc())


@fault("operation", "normalise", "std", "voiced.std(0)", samples=(2,), first_nan="normalise")
def deviation_of_a_single_frame():
    return Run(Recogniser(), (power(), (12, 10, 1)), loss=ctc())


@fault("operation", "augment", "mean", "quiet.mean()", first_nan="augment")
def mean_of_nothing_written_into_a_slice():
    return Run(Recogniser(level=-1e9), (power(), LENGTHS), loss=ctc())


@fault("operation", "attention", samples=(0,), first_nan="attention")
def attention_of_torch_with_all_frames_padded():
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0] = True
    return Run(Recogniser(), (power(), LENGTHS), {"padding": padding}, loss=ctc())


@fault("buffer", "frontend", parameter="frontend.filters", first_nan="frontend")
def filter_bank_with_a_NaN():
    model = Recogniser()
    model.frontend.filters[4, 3] = nan
    return Run(model, (power(), LENGTHS), loss=ctc())


@fault("parameter", "conv", parameter="conv.bias", first_inf="-", first_nan="conv")
def bfloat16_bias_is_NaN():
    model = Recogniser().bfloat16().eval()
    model.conv.bias.data[0] = nan
    return Run(model, (power().bfloat16(), LENGTHS))


@fault("input", samples=(1,))
def one_infinite_frame_of_power():
    x = power()
    x[1, 3, 5] = inf
    return Run(Recogniser().eval(), (x, LENGTHS))


@fault("loss", "", "log", "softmax(-1).log()", first_inf="")
def logarithm_of_a_softmax_that_underflows():
    model = Recogniser()
    model.head.weight.data *= 0
    model.head.bias.data[:] = torch.tensor([0.0, -300, 0, 0, 0, 0])

    return Run(model, (power(), LENGTHS), loss=lambda out: -out.softmax(-1).log()[:, :, 1].mean())


class Nested(nn.Module):
    """Utterances of different lengths as one NestedTensor."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, utterances):
        x = self.out(F.gelu(self.inp(utterances)))
        return torch.stack([part.mean(0) for part in x.unbind()])


class NestedLog(Nested):
    def forward(self, utterances):
        return super().forward(torch.log(utterances))


def nested(*, bad=None, layout=torch.jagged):
    parts = [torch.rand(n, 4) + 0.1 for n in (5, 3, 2)]
    if bad is not None:
        parts[1][2, 0] = bad
    return torch.nested.nested_tensor(parts, layout=layout)


@fault("input", first_inf="-")
def NaN_in_a_jagged_tensor():
    return Run(Nested(), (nested(bad=nan),))


@fault("input", first_inf="-")
def NaN_in_a_strided_nested_tensor():
    return Run(Nested(), (nested(bad=nan, layout=torch.strided),))


@fault("operation", "", "log", "torch.log(utterances)", first_inf="-")
def logarithm_of_a_negative_value_in_a_jagged_tensor():
    return Run(NestedLog(), (nested(bad=-1.0),))


@fault("parameter", "out", parameter="out.weight", first_inf="-", first_nan="out")
def NaN_weight_read_by_a_jagged_tensor():
    model = Nested()
    model.out.weight.data[1, 3] = nan
    return Run(model, (nested(),))


@healthy
def impossible_transcript_zeroed():
    return Run(Recogniser(), (power(), LENGTHS), loss=ctc(targets=6, clean=True))


@healthy
def recogniser_in_training():
    return Run(Recogniser(), (power(), LENGTHS), loss=ctc())


@healthy
def some_frames_padded():
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return Run(Recogniser(), (power(), LENGTHS), {"padding": padding}, loss=ctc())


@healthy
def jagged_tensors():
    return Run(Nested(), (nested(),), loss=lambda out: out.square().mean())


@healthy
def strided_nested_tensors():
    return Run(Nested(), (nested(layout=torch.strided),), loss=lambda out: out.square().mean())
