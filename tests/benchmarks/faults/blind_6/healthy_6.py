"""Healthy runs of pre-training and of surrogates, and of forecasters and classifiers as they are trained today."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from faults import classifier, forecaster, masked, surrogate
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_update, plain_validation

# -- pre-training ----------------------------------------------------------------------------------------------------


@healthy
def plain_masked() -> Training:
    """As it is."""
    return masked.build(601)


@healthy
def frames_told_from_others() -> Training:
    """A contrastive loss: which of the hidden frames of the same track is it, at a temperature of 0.1. Baevski et al. 2020,
    arXiv:2006.11477."""
    t = masked.build(602, dropout=0.1)
    t.clip = 5.0

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        frames, hidden = batch
        outputs = model(frames, hidden)
        similar = F.normalize(outputs, dim=-1) @ F.normalize(frames, dim=-1).mT / 0.1
        logits = similar.masked_fill(~hidden[:, None], -1e4)[hidden]
        wanted = torch.arange(masked.FRAMES).expand(len(frames), -1)[hidden]
        return {"loss": F.cross_entropy(logits, wanted), "logits": logits, "targets": wanted}

    t.forward = forward
    t.measure = lambda tensors, batch: {
        "accuracy": float((tensors["logits"].argmax(1) == tensors["targets"]).float().mean())
    }
    return t


@healthy
def teacher_that_follows() -> Training:
    """data2vec: whole tracks go to an average of the weights, whose normalised states are to be told where frames are hidden. Baevski
    et al. 2022, arXiv:2202.03555."""
    t = masked.build(603)
    t.model.head = nn.Sequential(
        nn.Linear(masked.WIDTH, 2 * masked.WIDTH), nn.GELU(), nn.Linear(2 * masked.WIDTH, masked.WIDTH)
    )
    teacher = copy.deepcopy(t.model).requires_grad_(False)

    def follow(training: Training, step: int) -> None:
        with torch.no_grad():
            for slow, weight in zip(teacher.parameters(), training.model.parameters(), strict=True):
                slow.lerp_(weight, 0.02)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        frames, hidden = batch
        outputs = model(frames, hidden)
        with torch.no_grad():
            targets = teacher.encode(frames, torch.zeros_like(hidden))
            targets = F.layer_norm(targets, targets.shape[-1:])
        return {"loss": F.smooth_l1_loss(outputs[hidden], targets[hidden]), "outputs": outputs, "targets": targets}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        """How often the nearest of all hidden frames' states is the right one."""
        told, wanted = (tensors[name][batch[1]] for name in ("outputs", "targets"))
        return {"recall": float((torch.cdist(told, wanted).argmin(1) == torch.arange(len(told))).float().mean())}

    t.after_step.append(follow)
    t.forward, t.measure = forward, measure
    return t


@healthy
def bfloat16_and_two_parts() -> Training:
    """bfloat16 autocast, two parts a step, no decay of norms and biases, a cosine, dropout of 0.1 and an absolute error."""
    t = masked.build(604, dropout=0.1)
    t.precision, t.accumulate, t.steps = torch.bfloat16, 2, 150
    plain = [p for p in t.model.parameters() if p.ndim < 2]
    rest = [p for p in t.model.parameters() if p.ndim > 1]
    groups = [{"params": rest, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    t.optimize = lambda p: torch.optim.AdamW(groups, 4e-3)
    t.schedule = lambda o: LambdaLR(
        o, lambda step: min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / 150))
    )

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        frames, hidden = batch
        outputs = model(frames, hidden).float()
        return {"loss": F.l1_loss(outputs[hidden], frames[hidden]), "outputs": outputs, "targets": frames}

    t.forward = forward
    return t


@healthy
def probe_of_a_pretrained_encoder() -> Training:
    """An encoder that was pre-trained for 150 steps is frozen, and a norm and a linear layer tell from how
    its states change whether a track is fast."""
    pretrained = masked.build(605)
    pretrained.prepare()
    for step in range(150):
        plain_update(pretrained, step, Silent())
    t = pretrained
    t.optimizers, t.clip, t.schedule, t.steps = [], None, None, 200
    t.model.requires_grad_(False)
    t.model.mask_token.grad = None
    t.model.probe = nn.Sequential(nn.BatchNorm1d(masked.WIDTH, affine=False), nn.Linear(masked.WIDTH, 2))
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-2)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        frames = batch[0]
        states = model.encode(frames, torch.zeros_like(batch[1]))
        logits = model.probe(states.diff(dim=1).abs().mean(1))
        fast = (frames.diff(dim=1).square().mean((1, 2)) / frames.square().mean((1, 2)) > 0.11).long()
        return {"loss": F.cross_entropy(logits, fast), "logits": logits, "targets": fast}

    t.forward = forward
    t.measure = lambda tensors, batch: {
        "accuracy": float((tensors["logits"].argmax(1) == tensors["targets"]).float().mean())
    }
    return t


class Silent:
    """Nobody looks while the encoder is pre-trained."""

    def backward_done(self, training: Training, step: int) -> None: ...


# -- surrogates ------------------------------------------------------------------------------------------------------


@healthy
def plain_surrogate() -> Training:
    """As it is."""
    return surrogate.build(611)


class Sine(nn.Module):
    def __init__(self, speed: float = 5.0) -> None:
        super().__init__()
        self.speed = speed

    def forward(self, x):
        return torch.sin(self.speed * x)


@healthy
def sines_with_their_weights() -> Training:
    """SIREN's sines and its first weights, which are divided by the speed. Sitzmann et al. 2020, arXiv:2006.09661."""
    t = surrogate.build(612, activation=Sine)
    for layer in t.model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.weight, -math.sqrt(6 / layer.in_features) / 5, math.sqrt(6 / layer.in_features) / 5)
            nn.init.zeros_(layer.bias)
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3)
    return t


@healthy
def means_and_deviations() -> Training:
    """A Gaussian likelihood: mean and deviation of each field, the deviation by a softplus and with a floor; AdamW, one cycle."""
    t = surrogate.build(613, fields=6)
    t.optimize, t.clip = (lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=1e-3)), 5.0
    t.schedule = lambda o: OneCycleLR(o, 8e-3, total_steps=300)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        mean, raw = model(batch[0]).chunk(2, -1)
        deviation = F.softplus(raw) + 0.02
        loss = F.gaussian_nll_loss(mean, batch[1], deviation.square())
        return {"loss": loss, "outputs": mean, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def another_channel() -> Training:
    """A surrogate that was trained for 200 steps goes on with simulations of a channel that is wired the other way round: only what the
    parameters go through and the head are trained, the layers rest."""
    t = surrogate.build(614)
    t.prepare()
    for step in range(200):
        plain_update(t, step, Silent())
    t.optimizers, t.schedule, plain = [], None, t.sample
    t.model.layers.requires_grad_(False)
    t.model.zero_grad()
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        turned = torch.stack([x[:, 0], x[:, 1], x[:, 2], -x[:, 3], x[:, 4]], 1)
        return turned, y * torch.tensor([0.8, 1.1, -1.0])

    t.sample = sample
    return t


# -- forecasters and classifiers -------------------------------------------------------------------------------------


@healthy
def huber_and_one_cycle() -> Training:
    """Huber's loss, AdamW, one cycle, and dropout of 0.1."""
    t = forecaster.build(621, dropout=0.1)
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=1e-2)
    t.schedule = lambda o: OneCycleLR(o, 1e-2, total_steps=300)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.huber_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def averaged_and_smoothed() -> Training:
    """Label smoothing, Nesterov, a cosine with warm-up, no decay of norms, and validation of an average of the weights."""
    t = classifier.build(622)
    matrices = [p for p in t.model.parameters() if p.ndim > 1]
    rest = [p for p in t.model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 1e-3}, {"params": rest, "weight_decay": 0.0}]
    t.optimize = lambda p: torch.optim.SGD(groups, 0.03, momentum=0.9, nesterov=True)
    t.schedule = lambda o: LambdaLR(o, lambda step: min((step + 1) / 15, 0.51 + 0.49 * math.cos(math.pi * step / 300)))
    average = copy.deepcopy(t.model)

    def follow(training: Training, step: int) -> None:
        with torch.no_grad():
            for slow, now in zip(average.state_dict().values(), training.model.state_dict().values(), strict=True):
                slow.copy_(slow.lerp(now, 0.05) if slow.is_floating_point() else now)

    def validate(training: Training, step: int, observer: Observer) -> None:
        own = copy.deepcopy(training.model.state_dict())
        training.model.load_state_dict(average.state_dict())
        plain_validation(training, step, observer)
        training.model.load_state_dict(own)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], label_smoothing=0.1), "logits": logits, "targets": batch[1]}

    t.after_step.append(follow)
    t.forward, t.validate = forward, validate
    return t
