"""More runs with nothing wrong: front ends that learn, gates, discrete codes, autoencoders without noise."""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR, StepLR

from faults import generator, keywords
from faults._fault import healthy
from faults._training import Batch, Tensors, Training, seeded


class Compressed(keywords.Spotter):
    """Energies to a power that is learnt, for each band, in front of the stem, with a floor."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.full((keywords.MELS, 1), 0.5))
        self.norm = nn.BatchNorm2d(1)

    def forward(self, energies):
        return super().forward(self.norm((energies + 1e-3) ** self.power.clamp(0.05, 1.0)))


@healthy
def compression_that_is_learnt() -> Training:
    """Energies as they are, a learnt power for each band with a floor, and a rate of its own for the powers. Wang et al. 2017,
    arXiv:1607.05666."""
    t = keywords.build(5)
    t.model = Compressed()
    data = {phase: keywords.spoken(n, seeded(5, n)) for phase, n in (("train", 1200), ("val", 240))}

    def sample(step: int, phase: str) -> Batch:
        energies, words = data[phase]
        chosen = torch.randint(len(words), (keywords.BATCH,), generator=seeded(25, step, len(phase)))
        return energies[chosen], words[chosen]

    others = [p for name, p in t.model.named_parameters() if name != "power"]
    groups = [{"params": others}, {"params": [t.model.power], "lr": 1e-2}]
    t.sample, t.schedule = sample, None
    t.optimizers = [torch.optim.Adam(groups, 3e-3)]
    return t


class Gated(nn.Module):
    """A gate between 0 and 1 for each channel, from the mean of all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.squeeze = nn.BatchNorm2d(channels), nn.Linear(channels, 5)
        self.excite = nn.Linear(5, channels)

    def forward(self, x):
        x = self.norm(x)
        gates = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gates[..., None, None]


@healthy
def squeezed_and_excited() -> Training:
    """Squeeze-and-excitation behind each convolution, Nesterov's momentum, a rate that falls in steps, clipping. Hu et al. 2018,
    arXiv:1709.01507."""
    t = keywords.build(6, norm=Gated, activation=nn.ReLU6, dropout=0.2)
    t.optimize = lambda p: torch.optim.SGD(p, 0.04, momentum=0.9, nesterov=True, weight_decay=5e-4)
    t.schedule, t.clip = (lambda optimizer: StepLR(optimizer, 80, 0.3)), 2.0
    return t


@healthy
def codes_of_one_in_eight() -> Training:
    """Eight discrete codes of eight values by Gumbel's softmax, whose temperature falls from 1 to a half. Jang et al. 2017,
    arXiv:1611.01144."""
    t = generator.build(5)
    t.model.encoder.mean, t.model.decoder.start = nn.Linear(24 * 16, 64), nn.Linear(64, 24 * 16)
    t.model.encoder.log_variance = nn.Identity()
    t.model.temperature = 1.0

    def draw(self, logits, hidden):
        parts = logits.unflatten(1, (8, 8))
        shares = F.gumbel_softmax(parts, self.temperature) if self.training else parts.softmax(2)
        return shares.flatten(1)

    t.model.draw = types.MethodType(draw, t.model)
    t.before = [lambda training, step: setattr(training.model, "temperature", max(0.5, 1 - step / 300))]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, parts, _ = model(batch[0])
        shares = parts.unflatten(1, (8, 8)).log_softmax(2)
        apart = (shares.exp() * (shares + torch.tensor(8.0).log())).sum((1, 2)).mean()
        pixels = F.binary_cross_entropy_with_logits(logits, batch[0], reduction="none").sum((1, 2, 3)).mean()
        return {"loss": pixels + 0.5 * apart, "divergence": apart, "outputs": logits.sigmoid(), "targets": batch[0]}

    t.forward = forward
    return t


@healthy
def code_without_noise() -> Training:
    """A regularised autoencoder: no noise, no variance, a penalty on the squares of codes and of the decoder's weights; a short warm-up.
    Ghosh et al. 2020, arXiv:1903.12436."""
    t = generator.build(6, activation=nn.ELU)
    t.model.encoder.log_variance = nn.Identity()
    t.model.draw = types.MethodType(lambda self, mean, hidden: mean, t.model)
    groups = [{"params": t.model.encoder.parameters()}, {"params": t.model.decoder.parameters(), "weight_decay": 1e-2}]
    t.optimizers, t.before = [torch.optim.AdamW(groups, 3e-3, weight_decay=0.0)], []
    t.schedule = lambda optimizer: LinearLR(optimizer, 0.1, total_iters=20)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, mean, _ = model(batch[0])
        outputs, size = logits.sigmoid(), mean.square().sum(1).mean()
        loss = (outputs - batch[0]).square().sum((1, 2, 3)).mean() + 0.02 * size
        return {"loss": loss, "divergence": size, "outputs": outputs, "targets": batch[0]}

    t.forward = forward
    return t
