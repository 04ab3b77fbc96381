"""Runs with nothing wrong: acoustic models, a translator and a separator as people train them, each seen to get better by its own metric."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from faults import separation, translator, vocoder
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation
from faults.separation import pit, shown


@healthy
def vocoder_with_an_average() -> Training:
    """GroupNorm and GELU, AdamW without decay of norms and biases, one cycle of rates; validated with a running average of weights."""
    t = vocoder.build(21, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.GELU)
    average = copy.deepcopy(t.model)
    flat = [p for p in t.model.parameters() if p.ndim < 2]
    groups = [{"params": [p for p in t.model.parameters() if p.ndim > 1], "weight_decay": 0.05}, {"params": flat}]
    t.optimizers = [torch.optim.AdamW(groups, 5e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 5e-3, total_steps=t.steps + 1, pct_start=0.2)

    def follow(training: Training, step: int) -> None:
        for mean, now in zip(average.parameters(), training.model.parameters(), strict=True):
            mean.data.lerp_(now.data, 0.08 if step > 15 else 1.0)

    def validate(training: Training, step: int, observer: Observer) -> None:
        plain = training.model
        training.model = average
        plain_validation(training, step, observer)
        training.model = plain

    t.after_step.append(follow)
    t.validate = validate
    return t


@healthy
def vocoder_in_bfloat16_with_dropout() -> Training:
    """The prenet drops 0.5, as in Tacotron, but in training only; autocast to bfloat16, batches of two accumulated, an L2 term beside the
    others, RAdam."""
    t = vocoder.build(22, activation=nn.SiLU)
    t.model.prenet[2].p = 0.5
    t.precision, t.accumulate, t.steps, t.val_every = torch.bfloat16, 2, 120, 30

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = tuple(part.float() for part in model(*batch[:2]))
        square = ((outputs[1] - batch[2]).square() * batch[4][..., None]).sum() / (batch[4].sum() * vocoder.MELS)
        return vocoder.shown(vocoder.terms(outputs, batch) + 0.5 * square, outputs, batch)

    t.forward = forward
    t.optimize = lambda p: torch.optim.RAdam(p, 8e-3, betas=(0.9, 0.99))
    return t


@healthy
def vocoder_tuned_for_a_louder_voice() -> Training:
    """A model that was trained for 120 steps learns a voice that is louder and brighter; the encoder and the attention are frozen, their
    norms and dropout in eval mode, a small rate that falls to a tenth."""
    t = vocoder.build(23)
    optimizer = torch.optim.Adam(t.model.parameters(), 4e-3)
    for step in range(120):
        optimizer.zero_grad()
        t.forward(t.model, t.sample(step + 4000, "train"))["loss"].backward()
        nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for part in (t.model.encoder, t.model.attention):
        part.requires_grad_(False)
    t.model.encoder.train = lambda mode=True: nn.Module.train(t.model.encoder, False)
    plain, shape = t.sample, torch.linspace(0.2, 0.8, vocoder.MELS)

    def sample(step: int, phase: str) -> Batch:
        _, phones, mels, stops, kept = plain(step, phase)
        louder = mels + shape * kept[..., None]
        return F.pad(louder[:, :-1], (0, 0, 1, 0)), phones, louder, stops, kept

    t.sample, t.steps, t.val_every = sample, 120, 20
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=1e-3)
    t.schedule = lambda o: CosineAnnealingLR(o, 120, eta_min=1e-4)
    return t


@healthy
def translator_from_short_to_long() -> Training:
    """Sentences of up to four words in the first 60 steps, then all; tied table and head of the target, SiLU, NAdam, label smoothing."""
    t = translator.build(24, activation=nn.SiLU)
    t.model.head.weight = t.model.target.table.weight
    long = t.sample
    few = translator.sentences(8000, torch.Generator().manual_seed(24))
    short = (few[0] != translator.PAD).sum(1) <= 4
    few = tuple(part[short] for part in few)

    def sample(step: int, phase: str) -> Batch:
        if phase == "train" and step < 60:
            chosen = torch.randint(len(few[0]), (translator.BATCH,), generator=torch.Generator().manual_seed(step))
            return tuple(part[chosen] for part in few)
        return long(step, phase)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten(), label_smoothing=0.05)
        return {"loss": loss, "logits": logits, "targets": batch[2]}

    t.sample, t.forward = sample, forward
    t.optimize = lambda p: torch.optim.NAdam(p, 4e-3)
    t.schedule = lambda o: LambdaLR(o, lambda step: min((step + 1) / 30, 1.0, (60 / (step + 1)) ** 0.5))
    return t


@healthy
def separator_that_keeps_the_mixture() -> Training:
    """Rectified masks, what is left of the mixture is shared by both outputs; gains of speakers are drawn anew in training; AdamW, the rate
    halved twice, gradients of two batches."""
    t = separation.build(25, activation=nn.SiLU)
    t.model.sigmoid = nn.Softplus()
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        _, references = plain(step, phase)
        if phase == "train":
            gains = 0.8 + 0.4 * torch.rand(len(references), 2, 1, generator=torch.Generator().manual_seed(step))
            references = gains * references
        return references.sum(1), references

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        estimates = estimates + (batch[0] - estimates.sum(1))[:, None] / 2
        return shown(pit(estimates, batch[1]), estimates, batch)

    t.sample, t.forward, t.accumulate, t.steps = sample, forward, 2, 200
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.01)
    t.schedule = lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [120, 170], 0.5)
    return t
