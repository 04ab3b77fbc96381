"""Runs with nothing wrong that look like faults: frozen, resting, sparse, unbalanced or noisy on purpose."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from faults import autoencoder, classifier, enhancement, language, recogniser, separation
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation
from faults.written import healthy_models


@healthy
def frozen_backbone() -> Training:
    """Only the head is trained, on features that were."""
    t = healthy_models.fine_tuned()
    t.optimize = lambda p: torch.optim.SGD(p, 0.001, momentum=0.9)
    return t


@healthy
def low_rank_adapters() -> Training:
    """LoRA: frozen layers, differences that start at zero."""
    return healthy_models.adapters()


@healthy
def checkpointed_activations() -> Training:
    """Each block runs twice: once forward, once within backward."""
    return language.build(6, checkpointed=True)


@healthy
def two_optimizers() -> Training:
    """A GAN: its losses go up and down, and neither falls."""
    return healthy_models.gan()


@healthy
def resting_experts() -> Training:
    """A mixture of experts, two of which are in reserve."""
    return healthy_models.mixture_of_experts()


@healthy
def strong_dropout() -> Training:
    """Dropout of one half."""
    return classifier.build(12, dropout=0.5)


@healthy
def dropout_in_transformer() -> Training:
    """Dropout of 0.2 on each branch."""
    return language.build(7, dropout=0.2)


@healthy
def sparse_on_purpose() -> Training:
    """A penalty keeps four of five activations of the code's neighbour at zero."""
    t = autoencoder.build(7, activation=nn.ReLU)
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        hidden = model.encoder[:4](batch[0])
        outputs = model.decoder(model.encoder[4:](hidden))
        sparsity = hidden.abs().mean()
        return {"loss": F.mse_loss(outputs, batch[0]) + 0.05 * sparsity, "outputs": outputs, "targets": batch[0]}

    t.forward = forward
    return t


@healthy
def best_eight() -> Training:
    """Only the eight largest of 32 units pass, another eight for each item."""
    t = autoencoder.build(8)

    def keep(module, args, output):
        return output * (output.abs() >= output.abs().topk(8, -1).values[..., -1:])

    t.model.encoder[1].register_forward_hook(keep)
    return t


@healthy
def accumulated_gradients() -> Training:
    """Four micro-batches a step, averaged."""
    t = recogniser.build(3)
    t.accumulate, t.steps = 4, 150
    return t


@healthy
def averaged_weights() -> Training:
    """Validation of a running average of the weights; training keeps its own."""
    t = separation.build(4)
    average = copy.deepcopy(t.model)

    def follow(training: Training, step: int) -> None:
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), training.model.parameters(), strict=True):
                mean.lerp_(weight, 0.05)

    def validate(training: Training, step: int, observer: Observer) -> None:
        own = copy.deepcopy(training.model.state_dict())
        training.model.load_state_dict(average.state_dict())
        plain_validation(training, step, observer)
        training.model.load_state_dict(own)

    t.after_step.append(follow)
    t.validate = validate
    return t


@healthy
def clipping_at_the_usual_norm() -> Training:
    """Clipping at a norm that half of the steps exceed, as most speech recipes do."""
    t = recogniser.build(4)
    t.clip = 2.0
    return t


@healthy
def mild_imbalance() -> Training:
    """One class is three times as frequent as the others."""
    t = classifier.build(13)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        more, labels = plain(step + 100_000, phase)
        rows = labels == 2
        return torch.cat([x, more[rows]]), torch.cat([y, labels[rows]])

    t.sample = sample
    return t


@healthy
def label_smoothing_and_noise() -> Training:
    """Smoothed labels, one in ten wrong: the loss ends high."""
    t = classifier.build(14)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x, torch.where(torch.arange(len(y)) % 10 == 0, y.roll(1), y)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], label_smoothing=0.1), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    return t


@healthy
def head_for_later() -> Training:
    """An auxiliary head is used at every second step only."""
    t = enhancement.build(6)
    t.model.extra = nn.Conv1d(enhancement.BINS, 1, 1)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = enhancement.compressed(outputs, batch[1])
        if int(batch[0].sum() * 1000) % 2:
            loss = loss + 0.01 * F.mse_loss(model.extra(outputs)[:, 0], batch[1].mean(1))
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def variational_autoencoder() -> Training:
    """Noise on the code, some units of which carry nothing."""
    return healthy_models.variational()


@healthy
def louder_validation() -> Training:
    """Validation at another level, by 3 dB, and longer files: usual."""
    t = separation.build(5)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        gain = 1.4 if phase == "val" else 1.0
        return mixture * gain, references * gain

    t.sample = sample
    return t


@healthy
def small_noisy_batches() -> Training:
    """Batches of four: a loss that jumps."""
    t = classifier.build(15, norm=lambda channels: nn.GroupNorm(2, channels))
    plain = t.sample
    t.sample = lambda step, phase: tuple(p[:4] for p in plain(step, phase)) if phase == "train" else plain(step, phase)
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3)
    return t
