"""A CTC recogniser: made-up symbols as bundles of frames, a subsampling convolution, a bidirectional GRU, AdamW."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

SYMBOLS, FEATURES, FRAMES, BATCH = 6, 10, 44, 12  # symbol 0 is the blank


class Recogniser(nn.Module):
    def __init__(self, norm=nn.LayerNorm, activation=nn.ReLU, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv1d(FEATURES, 32, 3, stride, padding=1)
        self.activation = activation()
        self.norm = norm(32)
        self.gru = nn.GRU(32, 24, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, SYMBOLS)

    def forward(self, x):
        x = self.activation(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.gru(self.norm(x))[0])


def utterances(n: int, generator: torch.Generator) -> Batch:
    """Features (batch, frames, features), labels (batch, 6), and lengths of the labels."""
    shapes = torch.randn(SYMBOLS, FEATURES, generator=seeded(37))
    steps = torch.randint(1, SYMBOLS - 1, (n, 6), generator=generator)
    labels = (steps.cumsum(1) + torch.randint(SYMBOLS, (n, 1), generator=generator)) % (SYMBOLS - 1) + 1
    lengths = torch.randint(4, 7, (n,), generator=generator)
    x = torch.zeros(n, FRAMES, FEATURES)
    for i in range(n):
        spans = torch.randint(4, 7, (int(lengths[i]),), generator=generator)
        frames = shapes[labels[i, : lengths[i]]].repeat_interleave(spans, 0)
        x[i, 3 : 3 + len(frames)] = frames[: FRAMES - 3]
    return x + torch.randn(x.shape, generator=generator), labels, lengths


def ctc(logits: torch.Tensor, batch: Batch, **options) -> torch.Tensor:
    frames = torch.full((len(logits),), logits.shape[1])
    return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), batch[1], frames, batch[2], **options)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits = model(batch[0])
    return {"loss": ctc(logits, batch), "logits": logits}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Share of utterances whose greedy transcript is right, and how many symbols are written for one spoken."""
    right, written = 0, 0
    for frames, labels, length in zip(tensors["logits"].argmax(-1), batch[1], batch[2], strict=True):
        text = [int(s) for s in torch.unique_consecutive(frames) if s]
        right += text == labels[:length].tolist()
        written += len(text)
    return {"exact": right / len(batch[2]), "written": written / int(batch[2].sum())}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: utterances(n, seeded(seed, n)) for phase, n in (("train", 1200), ("val", 120))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randint(len(data[phase][0]), (BATCH,), generator=seeded(seed, step, len(phase)))
        return tuple(part[chosen] for part in data[phase])

    optimize = lambda p: torch.optim.AdamW(p, 2e-3)  # noqa: E731 - one line beside its program
    return Training(Recogniser(**options), sample, forward, measure, optimize, clip=5.0)
