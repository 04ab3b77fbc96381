"""Captions of pictures: a convolutional encoder, an LSTM that looks at regions by attention, teacher forcing, padding, Adam."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

PAD, START, END, BESIDE, ABOVE = range(5)
COLOURS, SHAPES = 5, 4
WORDS = 5 + COLOURS + SHAPES  # 5 to 9 are colours, 10 to 13 shapes
NOTHING = -100  # no target
SIDE, PATCH, LENGTH, BATCH = 16, 5, 5, 32
CHANNELS, WIDTH, WORD = 48, 64, 24


class Encoder(nn.Module):
    """(batch, 3, 16, 16) to 16 regions of CHANNELS numbers."""

    def __init__(self, norm, activation) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), norm(32)
        self.conv3, self.norm3 = nn.Conv2d(32, CHANNELS, 3, padding=1, bias=False), norm(CHANNELS)
        self.relu1, self.relu2, self.relu3 = activation(), activation(), activation()
        self.pool = nn.MaxPool2d(2)
        self.places = nn.Parameter(0.3 * torch.randn((SIDE // 4) ** 2, CHANNELS))

    def forward(self, images):
        x = self.pool(self.relu1(self.norm1(self.conv1(images))))
        x = self.pool(self.relu2(self.norm2(self.conv2(x))))
        x = self.relu3(self.norm3(self.conv3(x)))
        return x.flatten(2).transpose(1, 2) + self.places


class Attention(nn.Module):
    """Where to look, from the regions and what the decoder remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.regions, self.memory, self.score = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.softmax = nn.Softmax(1)

    def forward(self, regions, keys, memory):
        weights = self.softmax(self.score(torch.tanh(keys + self.memory(memory)[:, None])).squeeze(2))
        return (weights[..., None] * regions).sum(1), weights


class Decoder(nn.Module):
    """One word after another: attention, a gate on what it found, an LSTM, a table of scores."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WORD, padding_idx=PAD)
        self.attention = Attention()
        self.first_state, self.first_cell = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.gate = nn.Linear(WIDTH, CHANNELS)
        self.cell = nn.LSTMCell(WORD + CHANNELS, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, WORDS)

    def begin(self, regions):
        mean = regions.mean(1)
        return torch.tanh(self.first_state(mean)), torch.tanh(self.first_cell(mean))

    def step(self, words, regions, keys, state):
        seen, weights = self.attention(regions, keys, state[0])
        seen = torch.sigmoid(self.gate(state[0])) * seen
        state = self.cell(torch.cat([self.words(words), seen], 1), state)
        return self.head(self.dropout(state[0])), weights, state

    def forward(self, regions, previous):
        """Scores and weights of each step, with the right words as the previous ones."""
        keys, state, scores, looks = self.attention.regions(regions), self.begin(regions), [], []
        for words in previous.unbind(1):
            score, weights, state = self.step(words, regions, keys, state)
            scores.append(score)
            looks.append(weights)
        return torch.stack(scores, 1), torch.stack(looks, 1)


class Captioner(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, activation=nn.ReLU, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(norm, activation), Decoder(dropout)

    def forward(self, images, previous):
        return self.decoder(self.encoder(images), previous)

    @torch.no_grad()
    def write(self, images) -> Tensor:
        """The likeliest word at each step, given those that it has written itself: (batch, LENGTH + 1)."""
        regions = self.encoder(images)
        keys, state, words = (
            self.decoder.attention.regions(regions),
            self.decoder.begin(regions),
            [torch.full((len(images),), START)],
        )
        for _ in range(LENGTH + 1):
            scores, _, state = self.decoder.step(words[-1], regions, keys, state)
            words.append(scores.argmax(1))
        return torch.stack(words[1:], 1)


def drawn(shapes: Tensor, colours: Tensor) -> Tensor:
    """Patches of (n, 3, PATCH, PATCH): a square, a frame, a cross, a diagonal in one of five colours."""
    full, edge, cross = torch.ones(PATCH, PATCH), torch.ones(PATCH, PATCH), torch.zeros(PATCH, PATCH)
    edge[1:-1, 1:-1], cross[PATCH // 2], cross[:, PATCH // 2] = 0, 1, 1
    masks = torch.stack([full, edge, cross, torch.eye(PATCH)])
    paints = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.float)
    return masks[shapes][:, None] * paints[colours][..., None, None]


def pictures(n: int, generator: torch.Generator) -> Batch:
    """One shape or two, beside or above one another; the caption names colour and shape of the left or upper one first."""
    images = 0.3 * torch.rand(n, 3, 1, 1, generator=generator) + 0.1 * torch.rand(n, 3, SIDE, SIDE, generator=generator)
    colours, shapes = (torch.randint(k, (n, 2), generator=generator) for k in (COLOURS, SHAPES))
    relation = torch.randint(3, (n,), generator=generator)  # 0 beside, 1 above, 2 alone
    near, far, free = (torch.randint(low, high, (n,), generator=generator) for low, high in ((0, 3), (8, 12), (0, 12)))
    both = [drawn(shapes[:, k], colours[:, k]) for k in (0, 1)]
    for i, kind in enumerate(relation.tolist()):
        places = ((free[i], near[i]), (free[i], far[i])) if kind == 0 else ((near[i], free[i]), (far[i], free[i]))
        for (top, left), patch in list(zip(places, both, strict=True))[: 1 if kind == 2 else 2]:
            images[i, :, top : top + PATCH, left : left + PATCH] += 0.6 * patch[i]
    words = torch.stack(
        [5 + colours[:, 0], 10 + shapes[:, 0], BESIDE + relation, 5 + colours[:, 1], 10 + shapes[:, 1]], 1
    )
    lengths = torch.where(relation == 2, 2, LENGTH)[:, None]
    kept = torch.arange(LENGTH) < lengths
    previous = torch.cat([torch.full((n, 1), START), words.where(kept, PAD)], 1)
    following = F.pad(words.where(kept, NOTHING), (0, 1), value=NOTHING).scatter(1, lengths, END)
    return (images - 0.3) / 0.2, previous, following


def forward(model: nn.Module, batch: Batch) -> Tensors:
    """Cross entropy of words that are not padding, and a term that has all regions looked at (Xu et al. 2015, arXiv:1502.03044)."""
    logits, looks = model(*batch[:2])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten(), ignore_index=NOTHING)
    loss = loss + 0.01 * (1 - looks.sum(1)).square().mean()
    tensors = {"loss": loss, "logits": logits, "targets": batch[2]}
    return tensors if model.training else {**tensors, "written": model.write(batch[0])}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    asked = batch[2] != NOTHING
    metrics = {"accuracy": float((tensors["logits"].argmax(-1) == batch[2])[asked].float().mean())}
    if "written" in tensors:
        metrics["exact"] = float(((tensors["written"] == batch[2]) | ~asked).all(1).float().mean())
    return metrics


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: pictures(n, seeded(seed, n)) for phase, n in (("train", 2400), ("val", 320))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randperm(len(data[phase][0]), generator=seeded(seed, step, len(phase)))[:BATCH]
        return tuple(part[chosen] for part in data[phase])

    return Training(
        Captioner(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 4e-3), steps=200, clip=5.0
    )
