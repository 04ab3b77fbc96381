"""Runs with nothing wrong: captioners, an autoencoder and a verifier, each seen to get better."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from faults import autoencoder, captioner, verifier
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation, seeded

if TYPE_CHECKING:
    from torch.nn import Module


@healthy
def captioner_with_group_norms() -> Training:
    """GroupNorm and GELU, AdamW without decay of vectors, a warm-up and a cosine, smoothed labels and more dropout, clipped to 1."""
    t = captioner.build(1, norm=lambda width: nn.GroupNorm(8, width), activation=nn.GELU, dropout=0.15)
    t.steps, t.clip = 250, 1.0
    matrices = [p for p in t.model.parameters() if p.ndim > 1]
    vectors = [p for p in t.model.parameters() if p.ndim <= 1]
    t.optimizers = [
        torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], 7e-3, weight_decay=0.01)
    ]

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors = captioner.forward(model, batch)
        logits, words = tensors["logits"].flatten(0, 1), batch[2].flatten()
        return {**tensors, "loss": F.cross_entropy(logits, words, ignore_index=captioner.NOTHING, label_smoothing=0.05)}

    def rate(step: int) -> float:
        return (step + 1) / 20 if step < 20 else 0.55 + 0.45 * math.cos(math.pi * (step - 20) / 230)

    t.forward, t.schedule = forward, lambda optimizer: LambdaLR(optimizer, rate)
    return t


@healthy
def captioner_from_a_classifier() -> Training:
    """The encoder has learnt to name the first shape and its colour; it is frozen, in eval mode, and not in the optimizer: only the
    decoder is trained, in bfloat16."""
    t = captioner.build(2)
    encoder, named = t.model.encoder, nn.Linear(16 * captioner.CHANNELS, captioner.COLOURS + captioner.SHAPES)
    optimizer = torch.optim.Adam([*encoder.parameters(), *named.parameters()], 5e-3)
    made = captioner.pictures(1600, seeded(741))
    for step in range(100):
        rows = torch.randint(1600, (captioner.BATCH,), generator=seeded(742, step))
        colours, shapes = named(encoder(made[0][rows]).flatten(1)).split([captioner.COLOURS, captioner.SHAPES], 1)
        loss = F.cross_entropy(colours, made[2][rows, 0] - 5) + F.cross_entropy(shapes, made[2][rows, 1] - 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.zero_grad()
    encoder.requires_grad_(False)
    encoder.train = lambda mode=True: nn.Module.train(encoder, False)
    t.precision, t.optimize = torch.bfloat16, lambda p: torch.optim.Adam(p, 5e-3)
    return t


@healthy
def captioner_short_captions_first() -> Training:
    """Pictures of one shape only in the first 40 steps, two optimizer groups, the encoder's at half the rate, one table of words for
    reading and writing, and an exponential moving average that is validated."""
    t = captioner.build(3)
    plain, model = t.sample, t.model
    model.decoder.head = nn.Sequential(
        nn.Linear(captioner.WIDTH, captioner.WORD), nn.Linear(captioner.WORD, captioner.WORDS)
    )
    model.decoder.head[1].weight = model.decoder.words.weight
    with torch.no_grad():
        model.decoder.words.weight.mul_(0.5)
    average = copy.deepcopy(model)

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        if phase == "val" or step >= 40:
            return batch
        many = [plain(1000 + 4 * step + i, phase) for i in range(4)]
        batch = tuple(torch.cat(part) for part in zip(*many, strict=True))
        short = (batch[2][:, 2] == captioner.END).nonzero()[: captioner.BATCH, 0]
        return tuple(part[short] for part in batch)

    def follow(training: Training, step: int) -> None:
        for mean, now in zip(average.state_dict().values(), training.model.state_dict().values(), strict=True):
            mean.lerp_(now, 0.1) if mean.is_floating_point() else mean.copy_(now)

    def validate(training: Training, step: int, observer: Observer) -> None:
        trained, training.model = training.model, average
        plain_validation(training, step, observer)
        training.model = trained

    groups = [{"params": list(model.encoder.parameters()), "lr": 2e-3}, {"params": list(model.decoder.parameters())}]
    t.optimizers = [torch.optim.NAdam(groups, 4e-3)]
    t.sample, t.validate, t.steps = sample, validate, 220
    t.after_step.append(follow)
    return t


class Tied(nn.Module):
    """Decodes with the transposed matrices of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(autoencoder.WIDTH, 32), nn.Linear(32, 6)
        self.back = nn.ParameterList([torch.zeros(32), torch.zeros(autoencoder.WIDTH)])

    def forward(self, x):
        code = self.second(F.elu(self.first(x)))
        hidden = F.elu(F.linear(code, self.second.weight.T, self.back[0]))
        return F.linear(hidden, self.first.weight.T, self.back[1])


@healthy
def autoencoder_tied_and_denoising() -> Training:
    """The decoder's matrices are the encoder's, transposed; noise of a third is put on what goes in, in training; ELU, Adamax, a cosine,
    two batches for each step."""
    t = autoencoder.build(1)
    t.model, t.accumulate = Tied(), 2

    def forward(model: Module, batch: Batch) -> Tensors:
        (x,) = batch
        outputs = model(x + torch.randn_like(x) / 3 if model.training else x)
        return {"loss": F.smooth_l1_loss(outputs, x), "outputs": outputs, "targets": x}

    t.forward, t.optimize = forward, lambda p: torch.optim.Adamax(p, 4e-3)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, t.steps)
    return t


@healthy
def verifier_margin_grows() -> Training:
    """The margin grows from nothing within 120 steps, as in recipes for large margins; one cycle of the rate, Nesterov's momentum, SiLU,
    weight decay on matrices, and features masked over time in training."""
    t = verifier.build(1, activation=nn.SiLU)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        if phase == "train":
            start = int(torch.randint(34, (), generator=seeded(743, step)))
            features = features.clone()
            features[:, start : start + 4] = 0
        return features, speakers

    def grow(training: Training, step: int) -> None:
        training.model.classifier.margin = 0.2 * min(1.0, step / 120)

    def optimize(parameters) -> torch.optim.Optimizer:
        kept = list(parameters)
        groups = [
            {"params": [p for p in kept if p.ndim > 1], "weight_decay": 1e-3},
            {"params": [p for p in kept if p.ndim <= 1]},
        ]
        return torch.optim.SGD(groups, 0.02, 0.9, nesterov=True)

    t.sample, t.optimize = sample, optimize
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 0.05, total_steps=t.steps)
    t.before.append(grow)
    return t
