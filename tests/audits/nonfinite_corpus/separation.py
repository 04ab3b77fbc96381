"""Speech separation as in DPRNN-TasNet: a weight-normalised filter bank, two LSTMs per block, PIT over SI-SDR."""

from itertools import permutations

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")


class GlobalNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        energy = (x * x).mean(dim=(1, 2, 3), keepdim=True)
        return x * (energy + 1e-5).rsqrt() * self.gain


class DualPath(nn.Module):
    """x: batch, chunks, frames, channels. Along frames, then along chunks."""

    def __init__(self, channels):
        super().__init__()
        self.intra = nn.LSTM(channels, channels, batch_first=True)
        self.inter = nn.LSTM(channels, channels, batch_first=True)
        self.norm = GlobalNorm(channels)

    def forward(self, x, state=None):
        batch, chunks, frames, channels = x.shape
        x = x + self.intra(x.reshape(-1, frames, channels))[0].view(x.shape)
        across = x.transpose(1, 2).reshape(-1, chunks, channels)
        y, state = self.inter(across, state)
        x = x + y.view(batch, frames, chunks, channels).transpose(1, 2)
        return self.norm(x), state


class Separator(nn.Module):
    def __init__(self, channels=6, normalise=False):
        super().__init__()
        self.encoder = parametrizations.weight_norm(nn.Conv1d(1, channels, 4, stride=4, bias=False))
        self.blocks = nn.ModuleList(DualPath(channels) for _ in range(2))
        self.mask = nn.Linear(channels, 2 * channels)
        self.decoder = nn.ConvTranspose1d(channels, 1, 4, stride=4)
        self.normalise = normalise

    def forward(self, mixture, state=None):
        if self.normalise:
            mixture = mixture / mixture.std(-1, keepdim=True)
        spectrum = self.encoder(mixture[:, None])
        x = spectrum.transpose(1, 2).unflatten(1, (4, -1))
        for block in self.blocks:
            x, state = block(x, state)
        masks = self.mask(x.flatten(1, 2)).transpose(1, 2).unflatten(1, (2, -1)).sigmoid()
        sources = masks * spectrum[:, None]
        return self.decoder(sources.flatten(0, 1)).view(len(mixture), 2, -1), state


def sounds(n=3):
    return torch.randn(n, 64)


def si_sdr(estimate, reference, eps=0.0):
    scale = (estimate * reference).sum(-1, keepdim=True) / (reference.square().sum(-1, keepdim=True) + eps)
    target = scale * reference
    noise = estimate - target
    return 10 * torch.log10(target.square().sum(-1) / (noise.square().sum(-1) + eps) + eps)


def pit(references, eps=0.0):
    def loss(out):
        pairwise = -si_sdr(out[0][:, :, None], references[:, None], eps)
        sums = torch.stack([sum(pairwise[:, i, j] for i, j in enumerate(p)) for p in permutations(range(2))], -1)
        return sums.amin(-1).mean()

    return loss


def pair(n=3):
    return torch.randn(n, 2, 64)


@fault("loss", "", "div", "reference.square()", first_inf="-")
def silent_reference():
    references = pair()
    references[1, 0] = 0
    return Run(Separator(), (references.sum(1),), loss=pit(references))


@fault("loss", "", "log10", "torch.log10", first_nan="-")
def estimate_that_is_orthogonal_to_the_reference():
    def loss(out):
        estimate = torch.stack([out[0][0, 0].detach().sign() * 0 + 1.0, out[0][0, 1]])
        reference = torch.ones(2, 64)
        reference[0, ::2] = -1
        return si_sdr(estimate, reference).mean()

    return Run(Separator(), (sounds(),), loss=loss)


@fault("operation", "", "div", "mixture.std", samples=(2,), first_inf="-", first_nan="")
def silent_clip_divided_by_its_level():
    x = sounds()
    x[2] = 0
    return Run(Separator(normalise=True), (x,), loss=lambda out: out[0].square().mean())


@fault(
    "parameter", "blocks.1.inter", parameter="blocks.1.inter.weight_hh_l0", first_inf="-", first_nan="blocks.1.inter"
)
def recurrent_weight_is_NaN():
    model = Separator()
    model.blocks[1].inter.weight_hh_l0.data[3, 2] = nan
    return Run(model, (sounds(),))


@fault("input", samples=None, first_inf="-")
def cell_state_from_the_last_chunk_is_NaN():
    state = torch.zeros(1, 12, 6), torch.zeros(1, 12, 6)
    state[1][0, 5, 1] = nan
    return Run(Separator().eval(), (sounds(),), {"state": state})


@fault(
    "operation",
    "encoder|encoder.parametrizations.weight|encoder.parametrizations.weight.0",
    "_weight_norm_interface|div",
)
def weight_norm_of_a_filter_that_is_zero():
    model = Separator()
    model.encoder.parametrizations.weight.original1.data[4] = 0
    return Run(model, (sounds(),), loss=lambda out: out[0].square().mean())


@fault("operation", "decoder", first_inf="decoder")
def decoder_overflows_half_precision():
    model = Separator().half().eval()
    model.decoder.weight.data[:] = 60000
    return Run(model, ((sounds() * 10).half(),))


@healthy
def energy_overflows_half_precision_and_only_makes_silence():
    model = Separator().half().eval()
    model.encoder.parametrizations.weight.original0.data *= 2000
    return Run(model, (sounds().half(),))


class Packed(nn.Module):
    """Utterances of different lengths, as one PackedSequence, which is a tuple of tensors."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 5, bidirectional=True)
        self.head = nn.Linear(10, 2)

    def forward(self, utterances):
        frames, lengths = pad_packed_sequence(self.rnn(utterances)[0])
        return self.head(frames.sum(0) / lengths[:, None])


def utterances():
    return pack_sequence([torch.randn(n, 4) for n in (5, 3, 2)])


@fault("input", "rnn|", first_inf="-")
def NaN_in_a_packed_sequence():
    packed = utterances()
    packed.data[4, 2] = nan
    return Run(Packed(), (packed,))


@fault("parameter", "rnn", parameter="rnn.bias_ih_l0_reverse", first_nan="rnn")
def infinite_bias_of_a_backward_direction():
    model = Packed()
    model.rnn.bias_ih_l0_reverse.data[7] = -inf
    model.rnn.bias_ih_l0_reverse.data[12] = nan
    return Run(model, (utterances(),))


@fault("backward", "", "sqrt|linalg_vector_norm|norm|pow", "level.sqrt()")
def level_of_a_silent_estimate_in_the_loss():
    def loss(out):
        level = (out[0][:, 1] * 0).square().mean(-1)
        return out[0].square().mean() + 0.1 * level.sqrt().mean()

    return Run(Separator(), (sounds(),), loss=loss)


@healthy
def silent_reference_with_eps():
    references = pair()
    references[1, 0] = 0
    return Run(Separator(), (references.sum(1),), loss=pit(references, eps=1e-8))


@healthy
def a_permutation_ruled_out_by_an_infinite_loss():
    references = pair()

    def loss(out):
        pairwise = -si_sdr(out[0][:, :, None], references[:, None], 1e-8)
        pairwise = pairwise.masked_fill(torch.eye(2, dtype=torch.bool), inf)
        return (
            torch.stack([pairwise.diagonal(0, 1, 2).sum(-1), pairwise.flip(1).diagonal(0, 1, 2).sum(-1)]).amin(0).mean()
        )

    return Run(Separator(), (references.sum(1),), loss=loss)


@healthy
def packed_sequences():
    return Run(Packed(), (utterances(),), loss=lambda out: out.square().mean())


@healthy
def states_handed_over_as_a_tuple():
    state = torch.zeros(1, 12, 6), torch.zeros(1, 12, 6)
    return Run(Separator(), (sounds(),), {"state": state}, loss=lambda out: out[0].square().mean())


@healthy
def loss_of_a_silent_reference_left_out_by_its_mask():
    references = pair()
    references[1, 0] = 0

    def loss(out):
        audible = references.square().sum(-1) > 0
        with torch.no_grad():
            shown = si_sdr(out[0], references)
        level = torch.where(audible, shown, 0.0).mean()
        return (out[0] - references).square().mean() - 0.0 * level

    return Run(Separator(), (references.sum(1),), loss=loss)
