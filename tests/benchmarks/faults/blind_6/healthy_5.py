"""Runs with nothing wrong: keyword spotters, variational autoencoders, U-Nets and recognisers, each seen to get better."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import generator, keywords, recogniser, segmenter
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation, seeded

# -- keyword spotters ------------------------------------------------------------------------------------------------


@healthy
def plain_keywords() -> Training:
    """Separable convolutions with BatchNorm, SGD with momentum, one cycle of the rate. Zhang et al. 2017, arXiv:1711.07128."""
    return keywords.build(1)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 5, stride, padding=2, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(4, outputs), nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 5, padding=2, bias=False)
        self.shortcut = nn.Conv1d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        return F.silu(self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class OverTime(nn.Module):
    """Mel bands are channels, convolutions run over time only."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(keywords.MELS, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(Residual(16, 24, 2), Residual(24, 32, 2))
        self.head = nn.Linear(32, keywords.WORDS)

    def forward(self, x):
        return self.head(self.blocks(self.front(x[:, 0])).mean(-1))


@healthy
def bands_as_channels() -> Training:
    """A temporal ResNet with GroupNorm and SiLU, AdamW, a cosine, smoothed labels, and masks over time and bands in training.
    Choi et al. 2019, arXiv:1904.03814."""
    t = keywords.build(2)
    t.model, plain = OverTime(), t.sample

    def sample(step: int, phase: str) -> Batch:
        x, words = plain(step, phase)
        if phase == "train":
            made = seeded(21, step)
            for i in range(len(x)):
                band, frame = torch.randint(16, (), generator=made), torch.randint(28, (), generator=made)
                x[i, :, band : band + 3], x[i, ..., frame : frame + 4] = 0.0, 0.0
        return x, words

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], label_smoothing=0.1), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.05)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, keywords.STEPS)
    return t


@healthy
def average_is_validated() -> Training:
    """Hardswish, no cycle, RMSprop; an exponential moving average of the weights is what is validated."""
    t = keywords.build(3, activation=nn.Hardswish)
    t.schedule, t.optimize = None, lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9)
    average = copy.deepcopy(t.model).requires_grad_(False)

    def follow(training: Training, step: int) -> None:
        decay = min(0.95, (1 + step) / (10 + step))
        for mean, now in zip(average.state_dict().values(), training.model.state_dict().values(), strict=True):
            mean.lerp_(now, 1 - decay) if mean.is_floating_point() else mean.copy_(now)

    def validate(training: Training, step: int, observer: Observer) -> None:
        trained, training.model = training.model, average
        plain_validation(training, step, observer)
        training.model = trained

    t.after_step, t.validate = [follow], validate
    return t


@healthy
def unknown_words_weigh_less() -> Training:
    """Half of the clips are of the class of all other words, which counts a third in the loss; clips are mixed with their
    neighbours in a fifth of the steps."""
    t = keywords.build(4)
    data = {phase: keywords.spoken(n, seeded(4, n)) for phase, n in (("train", 2000), ("val", 240))}
    weight = torch.tensor([0.33] + 7 * [1.0])

    def sample(step: int, phase: str) -> Batch:
        energies, words = data[phase]
        likely = torch.where(words == 0, 7.0, 1.0)
        chosen = torch.multinomial(likely, keywords.BATCH, generator=seeded(24, step, len(phase)))
        x, words = keywords.log_mel(energies[chosen]), words[chosen]
        share = 0.7 if phase == "train" and step % 5 == 0 else 1.0
        return share * x + (1 - share) * x.roll(1, 0), words, words.roll(1), torch.tensor(share)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        x, words, others, share = batch
        logits = model(x)
        losses = [F.cross_entropy(logits, wanted, weight) for wanted in (words, others)]
        return {"loss": share * losses[0] + (1 - share) * losses[1], "logits": logits, "targets": words}

    t.sample, t.forward = sample, forward
    return t


# -- variational autoencoders ----------------------------------------------------------------------------------------


@healthy
def plain_generator() -> Training:
    """A convolutional variational autoencoder, BatchNorm, a divergence that is warmed up, Adam."""
    return generator.build(1)


@healthy
def variance_by_its_best() -> Training:
    """A Gaussian likelihood whose one variance is the best for the batch: the loss is half the logarithm of the squared error, and
    falls below zero. GroupNorm, SiLU, AdamW, a cosine. Rybkin et al. 2021, arXiv:2006.13202."""
    t = generator.build(2, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.SiLU)
    t.optimize = lambda p: torch.optim.AdamW(p, 4e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 250)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, mean, log_variance = model(batch[0])
        apart = generator.divergence(mean, log_variance).mean()
        error = (outputs - batch[0]).square().mean()
        loss = 128 * (error + 1e-6).log() + model.beta * apart
        return {"loss": loss, "divergence": apart, "outputs": outputs, "targets": batch[0]}

    t.forward = forward
    return t


@healthy
def divergence_free_up_to_a_bound() -> Training:
    """No warm-up; a quarter of a nat is free for each number of the code, leaky ReLUs, Adamax. Kingma et al. 2016, arXiv:1606.04934."""
    t = generator.build(3, activation=lambda: nn.LeakyReLU(0.1))
    t.before, t.optimize = [], lambda p: torch.optim.Adamax(p, 6e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, mean, log_variance = model(batch[0])
        each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
        pixels = F.binary_cross_entropy_with_logits(logits, batch[0], reduction="none").sum((1, 2, 3)).mean()
        loss = pixels + each.clamp(min=0.25).sum()
        return {"loss": loss, "divergence": each.sum(), "outputs": logits.sigmoid(), "targets": batch[0]}

    t.forward = forward
    return t


class Several(generator.Generator):
    """Three codes for each picture in training, behind one another."""

    def forward(self, x):
        mean, log_variance = (part.repeat(3 if self.training else 1, 1) for part in self.encoder(x))
        code = self.draw(mean, log_variance)
        return self.decoder(code), mean, log_variance, code


@healthy
def bound_by_several_draws() -> Training:
    """Three codes for each picture, weighted by importance: the logarithm of a mean of exponentials. Burda et al. 2016,
    arXiv:1509.00519."""
    t = generator.build(4)
    t.model, t.before, t.clip, t.steps = Several(), [], 200.0, 200

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, mean, log_variance, code = model(batch[0])
        targets = batch[0].repeat(len(code) // len(batch[0]), 1, 1, 1)
        pixels = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum((1, 2, 3))
        prior = -0.5 * code.square().sum(1)
        posterior = -0.5 * ((code - mean).square() / log_variance.exp() + log_variance).sum(1)
        bounds = (prior - posterior - pixels).view(-1, len(batch[0]))
        loss = math.log(len(bounds)) - bounds.logsumexp(0).mean()
        apart = generator.divergence(mean, log_variance).mean()
        return {"loss": loss, "divergence": apart, "outputs": logits.sigmoid(), "targets": targets}

    t.forward = forward
    return t


# -- others ----------------------------------------------------------------------------------------------------------


@healthy
def missed_pixels_cost_more() -> Training:
    """A Tversky loss that weighs missed pixels more than false ones, bfloat16, two batches an update, clipping. Salehi et al. 2017,
    arXiv:1706.05721."""
    t = segmenter.build(11)
    t.precision, t.accumulate, t.clip, t.steps = torch.bfloat16, 2, 5.0, 160
    t.optimize = lambda p: torch.optim.NAdam(p, 4e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        x, y = batch
        logits = model(x).float()
        share = logits.softmax(1)[:, 1]
        both, false, missed = (share * y).sum(), (share * (1 - y)).sum(), ((1 - share) * y).sum()
        loss = 1 - (both + 1) / (both + 0.4 * false + 0.6 * missed + 1) + 0.3 * F.cross_entropy(logits, y)
        return {"loss": loss, "logits": logits, "targets": y}

    t.forward = forward
    return t


class Deeper(recogniser.Recogniser):
    """Dropout, and a head in front of the recurrence for a loss of its own."""

    def __init__(self) -> None:
        super().__init__(norm=lambda width: nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.1)), activation=nn.GELU)
        self.early = nn.Linear(32, recogniser.SYMBOLS)

    def forward(self, x):
        x = self.norm(self.activation(self.conv(x.transpose(1, 2))).transpose(1, 2))
        return self.head(self.gru(x)[0]), self.early(x)


@healthy
def transcribed_half_way_too() -> Training:
    """A second CTC loss in front of the recurrence, a warm-up of 40 steps and the inverse root after it. Lee and Watanabe 2021,
    arXiv:2102.03216."""
    t = recogniser.build(12)
    t.model = Deeper()
    t.optimize = lambda p: torch.optim.Adam(p, 4e-3, betas=(0.9, 0.98))
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min((step + 1) / 40, (40 / (step + 1)) ** 0.5))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, early = model(batch[0])
        loss = 0.7 * recogniser.ctc(logits, batch) + 0.3 * recogniser.ctc(early, batch)
        return {"loss": loss, "logits": logits}

    t.forward = forward
    return t
