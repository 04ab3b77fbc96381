"""A tagger of words: embeddings of words and of their shapes, a bidirectional LSTM over packed sentences, rare tags, Adam."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from faults._training import Batch, Tensors, Training, seeded

PAD, NOTHING = 0, -100
TITLE, PLACE, NAME, DATE, WORDS = 1, 9, 17, 57, 240  # words below are of the kind before; 0 is padding
TAGS = ("other", "person", "location", "date")
SHAPES, LENGTH, WIDTH, HIDDEN, BATCH = 5, 14, 24, 24, 32


class Tagger(nn.Module):
    def __init__(self, cell=nn.LSTM, dropout: float = 0.1, layers: int = 1, activation=nn.Tanh) -> None:
        super().__init__()
        self.words, self.shapes = nn.Embedding(WORDS, WIDTH, padding_idx=PAD), nn.Embedding(SHAPES, 8, padding_idx=PAD)
        self.dropout = nn.Dropout(dropout)
        self.lstm = cell(WIDTH + 8, HIDDEN, layers, batch_first=True, bidirectional=True)
        self.hidden = nn.Sequential(nn.Linear(2 * HIDDEN, WIDTH), activation())
        self.head = nn.Linear(WIDTH, len(TAGS))

    def forward(self, words, shapes):
        x = self.dropout(torch.cat([self.words(words), self.shapes(shapes)], -1))
        packed = pack_padded_sequence(x, (words != PAD).sum(1), batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=words.shape[1])
        return self.head(self.dropout(self.hidden(x)))


def sentences(n: int, generator: torch.Generator) -> Batch:
    """Words, shapes and tags, padded. A name behind a title or before a verb of speaking (words whose number divides by 7) is a
    person, one behind a preposition a location, and others are of neither kind; a date is a number behind a name of month."""
    words, drawn = (
        torch.randint(DATE, WORDS, (n, LENGTH), generator=generator),
        torch.rand(n, LENGTH, generator=generator),
    )
    for low, high, least, most in ((TITLE, PLACE, 0.0, 0.06), (PLACE, NAME, 0.06, 0.15), (NAME, DATE, 0.15, 0.27), (DATE, DATE + 12, 0.27, 0.32)):  # fmt: skip
        words = torch.where(
            (drawn >= least) & (drawn < most), torch.randint(low, high, (n, LENGTH), generator=generator), words
        )
    following = torch.rand(n, LENGTH, generator=generator) < 0.6
    for place in range(1, LENGTH):
        last, now = words[:, place - 1], words[:, place]
        named = torch.randint(NAME, DATE, (n,), generator=generator)
        numbered = torch.randint(WORDS - 40, WORDS, (n,), generator=generator)
        now = torch.where(following[:, place] & (last < NAME), named, now)
        words[:, place] = torch.where(following[:, place] & (last >= DATE) & (last < DATE + 12), numbered, now)
    before, behind = F.pad(words[:, :-1], (1, 0), value=WORDS - 1), F.pad(words[:, 1:], (0, 1), value=WORDS - 1)
    name, number, plain = (words >= NAME) & (words < DATE), words >= WORDS - 40, words >= DATE
    tags = torch.zeros_like(words)
    tags[name & ((before < PLACE) | ((behind >= DATE) & (behind % 7 == 0)))] = 1
    tags[name & (before >= PLACE) & (before < NAME)] = 2
    tags[number & (before >= DATE) & (before < DATE + 12)] = 3
    shapes = torch.ones_like(words) + name.long() + 2 * number.long() * plain.long()
    kept = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (n, 1), generator=generator)
    return words.where(kept, PAD), shapes.where(kept, PAD), tags.where(kept, NOTHING)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits = model(*batch[:2])
    return {"loss": F.cross_entropy(logits.flatten(0, 1), batch[2].flatten()), "logits": logits, "targets": batch[2]}


def scores(said: torch.Tensor, tags: torch.Tensor) -> dict[str, object]:
    """Over all tags that are not `other`: how much of what is said is right, how much of what is right is said, F1 of both."""
    asked = tags != NOTHING
    right = ((said == tags) & (tags > 0)).sum()
    precision, recall = right / ((said > 0) & asked).sum().clamp(min=1), right / (tags > 0).sum().clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-6)
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    said, asked = tensors["logits"].argmax(-1), batch[2] != NOTHING
    return {**scores(said, batch[2]), "accuracy": float((said == batch[2])[asked].float().mean())}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: sentences(n, seeded(seed, n)) for phase, n in (("train", 4000), ("val", 400))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randint(len(data[phase][0]), (BATCH,), generator=seeded(seed, step, len(phase)))
        return tuple(part[chosen] for part in data[phase])

    optimize = lambda p: torch.optim.Adam(p, 1e-2)  # noqa: E731 - one line beside its program
    return Training(Tagger(**options), sample, forward, measure, optimize, steps=250, clip=5.0)
