"""Speaker verification: dilated convolutions, pooling of mean and deviation, additive-margin softmax, equal error rate, SGD."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

SPEAKERS, FEATURES, FRAMES, CHANNELS, WIDTH, BATCH = 24, 16, 40, 32, 24, 48


class Frames(nn.Module):
    """One layer over frames: a dilated convolution, an activation and BatchNorm, as in x-vectors."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int, norm, activation) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=dilation * (kernel // 2))
        self.activation, self.norm = activation(), norm(outputs)

    def forward(self, x):
        return self.norm(self.activation(self.conv(x)))


class StatisticsPooling(nn.Module):
    """Mean and deviation over time: (batch, channels, frames) to (batch, 2 * channels)."""

    def forward(self, x):
        return torch.cat([x.mean(2), x.var(2, correction=0).clamp(min=1e-5).sqrt()], 1)


class MarginSoftmax(nn.Module):
    """Scaled cosines of embeddings with a weight of each speaker; that of the right one less a margin in training."""

    def __init__(self, width: int, speakers: int, scale: float = 10.0, margin: float = 0.2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(speakers, width))
        nn.init.xavier_normal_(self.weight)
        self.scale, self.margin = scale, margin

    def forward(self, embeddings, speakers=None):
        cosines = F.linear(F.normalize(embeddings), F.normalize(self.weight))
        if self.training and speakers is not None:
            cosines = cosines - self.margin * F.one_hot(speakers, len(self.weight))
        return self.scale * cosines


class Verifier(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d, activation=nn.ReLU) -> None:
        super().__init__()
        self.frame1 = Frames(FEATURES, CHANNELS, 5, 1, norm, activation)
        self.frame2 = Frames(CHANNELS, CHANNELS, 3, 2, norm, activation)
        self.frame3 = Frames(CHANNELS, CHANNELS, 3, 3, norm, activation)
        self.frame4 = Frames(CHANNELS, 2 * CHANNELS, 1, 1, norm, activation)
        self.pooling = StatisticsPooling()
        self.embedding = nn.Linear(4 * CHANNELS, WIDTH, bias=False)
        self.norm = norm(WIDTH)
        self.classifier = MarginSoftmax(WIDTH, SPEAKERS)

    def embed(self, features):
        """(batch, frames, features) to (batch, WIDTH)."""
        x = self.frame4(self.frame3(self.frame2(self.frame1(features.transpose(1, 2)))))
        return self.norm(self.embedding(self.pooling(x)))

    def forward(self, features, speakers=None):
        embeddings = self.embed(features)
        return embeddings, self.classifier(embeddings, speakers)


def utterances(n: int, generator: torch.Generator) -> Batch:
    """Phones of five frames, each moved and scaled by a speaker's own tract, over a channel of each recording and noise."""
    made = seeded(151)
    phones = torch.randn(12, FEATURES, generator=made)
    voices = 0.5 * torch.randn(SPEAKERS, FEATURES, generator=made)
    tracts = torch.eye(FEATURES) + 0.2 * torch.randn(SPEAKERS, FEATURES, FEATURES, generator=made)
    speakers = torch.randint(SPEAKERS, (n,), generator=generator)
    said = torch.randint(12, (n, FRAMES // 5 + 1), generator=generator).repeat_interleave(5, 1)[:, 2 : FRAMES + 2]
    x = phones[said] @ tracts[speakers] + voices[speakers][:, None]
    x = x + 0.4 * torch.randn(n, 1, FEATURES, generator=generator)
    return x + torch.randn(x.shape, generator=generator), speakers


def forward(model: nn.Module, batch: Batch) -> Tensors:
    embeddings, logits = model(*batch)
    return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1], "embeddings": embeddings}


def trials(embeddings: torch.Tensor, speakers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of all pairs of a batch, and which of them are of one speaker."""
    unit = F.normalize(embeddings)
    rows, columns = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.T)[rows, columns], speakers[rows] == speakers[columns]


def equal_error_rate(scores: torch.Tensor, same: torch.Tensor) -> float:
    """Where as many pairs of one speaker are refused as pairs of two are accepted."""
    ordered = same[scores.argsort()].float()
    refused, accepted = ordered.cumsum(0) / ordered.sum(), 1 - (1 - ordered).cumsum(0) / (1 - ordered).sum()
    nearest = (refused - accepted).abs().argmin()
    return float((refused + accepted)[nearest] / 2)


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    return {
        "eer": equal_error_rate(*trials(tensors["embeddings"], batch[1])),
        "accuracy": float((tensors["logits"].argmax(1) == batch[1]).float().mean()),
    }


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: utterances(n, seeded(seed, n)) for phase, n in (("train", 2400), ("val", 300))}

    def sample(step: int, phase: str) -> Batch:
        size = BATCH if phase == "train" else 2 * BATCH
        chosen = torch.randperm(len(data[phase][0]), generator=seeded(seed, step, len(phase)))[:size]
        return tuple(part[chosen] for part in data[phase])

    return Training(Verifier(**options), sample, forward, measure, lambda p: torch.optim.SGD(p, 0.02, 0.9), steps=250)
