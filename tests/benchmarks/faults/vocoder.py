"""A vocoder's acoustic model: log mel frames from phones by attention, without durations, with a stop token; Adam, clipping, warm-up."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults._training import Batch, Tensors, Training, seeded

PAD, PHONES, LONGEST, FRAMES = 0, 16, 7, 28  # phones are 1 to 15, of two to four frames each
MELS, WIDTH, BATCH = 20, 32, 12


class Encoder(nn.Module):
    """Embeddings of phones with their neighbours: (batch, phones) -> (batch, phones, width)."""

    def __init__(self, norm, activation, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(PHONES, WIDTH, padding_idx=PAD)
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(2))
        self.activation, self.dropout = activation(), nn.Dropout(dropout)

    def forward(self, phones):
        x = self.table(phones).transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + self.dropout(self.activation(norm(conv(x))))
        return x.transpose(1, 2)


class Attention(nn.Module):
    """From the state of a frame to a phone; both know their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.softmax = nn.Softmax(-1)

    def forward(self, states, memory, padding):
        scores = self.query(states) @ self.key(memory).mT / math.sqrt(WIDTH)
        weights = self.softmax(scores.masked_fill(padding[:, None], -math.inf))
        return weights @ self.value(memory), weights


class Gated(nn.Module):
    """A causal dilated convolution as in WaveNet, residual: (batch, width, frames)."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=dilation)
        self.tanh, self.sigmoid = nn.Tanh(), nn.Sigmoid()
        self.out = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        value, gate = self.conv(F.pad(x, (self.dilation, 0))).chunk(2, 1)
        return x + self.out(self.tanh(value) * self.sigmoid(gate))


class Vocoder(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d, activation=nn.ReLU, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = Encoder(norm, activation, dropout)
        self.prenet = nn.Sequential(
            nn.Linear(MELS, WIDTH), activation(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH), activation()
        )
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.attention = Attention()
        self.join = nn.Linear(2 * WIDTH, WIDTH)
        self.decoder = nn.Sequential(*(Gated(2**i) for i in range(3)))
        self.mel, self.stop = nn.Linear(WIDTH, MELS), nn.Linear(WIDTH, 1)
        self.postnet = nn.Sequential(
            nn.Conv1d(MELS, WIDTH, 5, padding=2), nn.Tanh(), nn.Dropout(dropout), nn.Conv1d(WIDTH, MELS, 5, padding=2)
        )
        rates = torch.exp(-math.log(50.0) * torch.arange(0, WIDTH, 2) / WIDTH)
        angles = torch.arange(FRAMES)[:, None] * rates
        self.register_buffer("position", torch.cat([angles.sin(), angles.cos()], 1))

    def forward(self, previous, phones):
        memory = self.encoder(phones) + self.position[: phones.shape[1]]
        states = self.gru(self.prenet(previous))[0]
        context, weights = self.attention(states, memory, phones == PAD)
        x = self.decoder(self.join(torch.cat([states, context], -1)).transpose(1, 2)).transpose(1, 2)
        rough = self.mel(x)
        fine = rough + self.postnet(rough.transpose(1, 2)).transpose(1, 2)
        return rough, fine, self.stop(x).squeeze(-1), weights


def speech(n: int, generator: torch.Generator) -> Batch:
    """Previous frames, phones, frames, stops, and where frames are: each phone has its formants and its duration, neighbours
    colour it; speakers differ in level and tilt."""
    made, bands = seeded(83), torch.arange(MELS)
    formants = torch.rand(PHONES, 2, 1, generator=made) * torch.tensor([[8.0], [10.0]]) + torch.tensor([[1.0], [9.0]])
    template = 2.6 * torch.exp(-((bands - formants) ** 2) / 5).sum(1) - 0.8
    phones = torch.randint(1, PHONES, (n, LONGEST), generator=generator)
    phones[torch.arange(LONGEST) >= torch.randint(3, LONGEST + 1, (n, 1), generator=generator)] = PAD
    ends = ((2 + phones % 3) * (phones != PAD)).cumsum(1)
    time = torch.arange(FRAMES).expand(n, FRAMES).contiguous()
    said = phones.gather(1, torch.searchsorted(ends, time, right=True).clamp(max=LONGEST - 1))
    mels = template[said]
    before, after = mels.roll(1, 1), mels.roll(-1, 1)
    before[:, 0], after[:, -1] = mels[:, 0], mels[:, -1]
    level = 0.3 * torch.randn(n, 1, 1, generator=generator)
    tilt = 0.04 * torch.randn(n, 1, 1, generator=generator) * (bands - MELS / 2)
    mels = 0.25 * before + 0.5 * mels + 0.25 * after + level + tilt
    mels = mels + 0.1 * torch.randn(mels.shape, generator=generator)
    kept = time < ends[:, -1:]
    mels = mels * kept[..., None]
    stops = (time == ends[:, -1:] - 1).float()
    return F.pad(mels[:, :-1], (0, 0, 1, 0)), phones, mels, stops, kept


def spectral(estimate: torch.Tensor, mels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """L1 of frames, and of means over two and four of them."""
    total = torch.zeros(())
    for size in (1, 2, 4):
        pooled = [
            F.avg_pool1d(x.transpose(1, 2), size)
            for x in ((estimate - mels) * kept[..., None], kept.float()[..., None])
        ]
        total = total + pooled[0].abs().sum() / (pooled[1].sum() * MELS)
    return total / 3


def guide(weights: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Attention far from the diagonal. Source: Tachibana et al. 2018, arXiv:1710.08969."""
    frames, phones = batch[4].sum(1)[:, None, None], (batch[1] != PAD).sum(1)[:, None, None]
    away = torch.arange(FRAMES)[:, None] / frames - torch.arange(LONGEST) / phones
    return (weights * (1 - torch.exp(-(away**2) / 0.08)) * batch[4][..., None]).sum(-1).mean()


def shown(loss: torch.Tensor, outputs: tuple[torch.Tensor, ...], batch: Batch) -> Tensors:
    return {
        "loss": loss,
        "outputs": outputs[1],
        "targets": batch[2],
        "stop_logits": outputs[2],
        "stop_targets": batch[3],
    }


def terms(outputs: tuple[torch.Tensor, ...], batch: Batch) -> torch.Tensor:
    """All terms of the loss, added up."""
    rough, fine, stop, weights = outputs
    stopped = F.binary_cross_entropy_with_logits(stop, batch[3], batch[4].float(), pos_weight=torch.tensor(5.0))
    return spectral(rough, batch[2], batch[4]) + spectral(fine, batch[2], batch[4]) + stopped + guide(weights, batch)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    outputs = model(*batch[:2])
    return shown(terms(outputs, batch), outputs, batch)


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    kept, stops = batch[4], batch[3] > 0
    said = tensors["stop_logits"] > 0
    return {
        "mel_error": float((tensors["outputs"] - batch[2])[kept].abs().mean()),
        "stop_accuracy": float((said == stops)[kept].float().mean()),
        "stop_recall": float(said[stops].float().mean()),
    }


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: speech(n, seeded(seed, n)) for phase, n in (("train", 3000), ("val", 300))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randint(len(data[phase][0]), (BATCH,), generator=seeded(seed, step, len(phase)))
        return tuple(part[chosen] for part in data[phase])

    warm_up = lambda optimizer: LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1.0, (60 / (step + 1)) ** 0.5))  # noqa: E731 - as in other programs
    optimize = lambda p: torch.optim.Adam(p, 4e-3, betas=(0.9, 0.99))  # noqa: E731
    return Training(Vocoder(**options), sample, forward, measure, optimize, warm_up, steps=200, clip=1.0)
