"""Runs with nothing wrong: what people train with waveforms and spectra, each seen to get better by a metric of its own."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from faults import enhancement, separation
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_update, plain_validation
from faults.enhancement import BINS, WIDTH, compressed
from faults.separation import CHANNELS, SAMPLES, WINDOW, pit, shown, si_sdr

# -- separation ------------------------------------------------------------------------------------------------------


def spectrum(x: torch.Tensor, window: int) -> torch.Tensor:
    """Magnitudes of all signals of the last axis."""
    return torch.stft(
        x.flatten(0, -2), window, window // 4, window=torch.hann_window(window), return_complex=True
    ).abs()


@healthy
def several_resolutions() -> Training:
    """Magnitudes at three resolutions beside the SI-SDR, all under the assignment of the latter; AdamW and a cosine."""
    t = separation.build(181)
    t.optimize = lambda p: torch.optim.AdamW(p, 4e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 300)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates, references = model(batch[0]), batch[1]
        straight, crossed = (si_sdr(estimates, r).mean(1) for r in (references, references.flip(1)))
        references = torch.where((straight >= crossed)[:, None, None], references, references.flip(1))
        loss = -si_sdr(estimates, references).mean()
        for window in (32, 64, 128):
            loss = loss + F.l1_loss(spectrum(estimates, window), spectrum(references, window))
        return shown(loss, estimates, batch)

    t.forward = forward
    return t


class Recurrent(separation.Separator):
    """A GRU of two directions in place of convolutions, and masks through ReLU, as in many separators."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Identity()
        self.norm = nn.GroupNorm(1, CHANNELS)
        self.rnn = nn.GRU(CHANNELS, CHANNELS, 1, batch_first=True, bidirectional=True)
        self.mask = nn.Conv1d(2 * CHANNELS, 2 * CHANNELS, 1)
        self.rectified = nn.ReLU()

    def forward(self, mixture):
        encoded = self.encoder(mixture[:, None])
        features = self.rnn(self.norm(encoded).transpose(1, 2))[0].transpose(1, 2)
        masks = self.rectified(self.mask(features)).unflatten(1, (2, CHANNELS))
        return self.decoder((masks * encoded[:, None]).flatten(0, 1)).view(len(mixture), 2, -1)


@healthy
def recurrent_masks() -> Training:
    """A bidirectional GRU and rectified masks; the rate is halved when validation gets no better."""
    t = separation.build(82)
    t.model, t.steps = Recurrent(), 200
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)
    schedulers: list[ReduceLROnPlateau] = []

    def validate(training: Training, step: int, observer: Observer) -> None:
        if not schedulers:
            schedulers.append(ReduceLROnPlateau(training.optimizer, "max", 0.5, 1, threshold_mode="abs"))
        plain_validation(training, step, observer)
        with torch.no_grad():
            batch = training.sample(step, "val")
            schedulers[0].step(-float(pit(training.model(batch[0]), batch[1])))

    t.validate = validate
    return t


class Attentive(separation.Separator):
    """Transformer layers over frames in place of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Identity()
        layer = nn.TransformerEncoderLayer(CHANNELS, 4, 64, 0.0, nn.functional.gelu, batch_first=True, norm_first=True)
        self.attention = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        time = torch.arange(SAMPLES // (WINDOW // 2) - 1)[:, None] / 10 ** torch.linspace(0, 2, CHANNELS // 2)
        self.register_buffer("place", torch.cat([time.sin(), time.cos()], 1), persistent=False)

    def forward(self, mixture):
        encoded = self.encoder(mixture[:, None])
        features = self.attention(encoded.transpose(1, 2) + self.place).transpose(1, 2)
        masks = self.sigmoid(self.mask(features)).unflatten(1, (2, CHANNELS))
        return self.decoder((masks * encoded[:, None]).flatten(0, 1)).view(len(mixture), 2, -1)


@healthy
def masks_by_attention() -> Training:
    """Pre-norm transformer layers with four heads; AdamW, a warm-up of 30 steps and a decay with their root."""
    t = separation.build(83)
    t.model = Attentive()
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min((step + 1) / 30, (30 / (step + 1)) ** 0.5))
    return t


class Complex(nn.Module):
    """Masks with phases, within 2 by a tanh, for a short-time Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.first = nn.Conv1d(2 * 33, 48, 3, padding=1)
        self.norm = nn.InstanceNorm1d(48, affine=True)
        self.second = nn.Conv1d(48, 48, 3, padding=2, dilation=2)
        self.act = nn.SiLU()
        self.last = nn.Conv1d(48, 2 * 2 * 33, 1)
        self.tanh = nn.Tanh()

    def forward(self, mixture):
        spectrum = torch.stft(mixture, 64, 16, window=self.window, return_complex=True)
        x = self.act(self.norm(self.first(torch.cat([spectrum.real, spectrum.imag], 1))))
        x = x + self.act(self.second(x))
        masks = 2 * self.tanh(self.last(x)).unflatten(1, (2, 2, 33))
        parts = torch.complex(masks[:, :, 0], masks[:, :, 1]) * spectrum[:, None]
        return torch.istft(parts.flatten(0, 1), 64, 16, window=self.window, length=mixture.shape[1]).unflatten(
            0, (-1, 2)
        )


@healthy
def masks_with_phases() -> Training:
    """Complex masks for a Fourier transform within the model; RAdam."""
    t = separation.build(84)
    t.model, t.steps = Complex(), 400
    t.optimize = lambda p: torch.optim.RAdam(p, 5e-3)
    return t


class Direct(nn.Module):
    """Waveforms in, waveforms out: strided convolutions down and up with skips, and weight norm everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.into = weight_norm(nn.Conv1d(1, 24, 16, 8, padding=4))
        self.down = weight_norm(nn.Conv1d(24, 48, 4, 2, padding=1))
        self.middle = weight_norm(nn.Conv1d(48, 48, 3, padding=1))
        self.up = weight_norm(nn.ConvTranspose1d(48, 24, 4, 2, padding=1))
        self.out = weight_norm(nn.ConvTranspose1d(24, 2, 16, 8, padding=4))
        self.act = nn.LeakyReLU(0.2)

    def forward(self, mixture):
        first = self.act(self.into(mixture[:, None]))
        second = self.act(self.down(first))
        x = second + self.act(self.middle(second))
        return self.out(first + self.act(self.up(x)))


@healthy
def waveforms_in_and_out() -> Training:
    """No masks: a small U-net makes waveforms, with weight norm; the better absolute error of both assignments."""
    t = separation.build(85)
    t.model, t.steps = Direct(), 400
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        both = [(estimates - r).abs().mean((1, 2)) for r in (batch[1], batch[1].flip(1))]
        return shown(torch.minimum(*both).mean(), estimates, batch)

    t.forward = forward
    return t


@healthy
def low_voice_first() -> Training:
    """References are sorted by pitch, so that no assignment is sought; Adagrad."""
    t = separation.build(86)
    plain = t.sample
    t.optimize = lambda p: torch.optim.Adagrad(p, 0.02)

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        power = torch.fft.rfft(references).abs().square()
        centre = (power * torch.arange(power.shape[-1])).sum(-1) / power.sum(-1)
        order = centre.argsort(1)[..., None].expand_as(references)
        return mixture, references.gather(1, order)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        return shown(-si_sdr(estimates, batch[1]).mean(), estimates, batch)

    t.sample, t.forward = sample, forward
    return t


@healthy
def filters_of_fourier() -> Training:
    """Encoder and decoder are fixed: cosines and sines under a window. Only what lies between them is trained."""
    t = separation.build(87)
    time, orders = torch.arange(WINDOW), torch.arange(1, CHANNELS // 2 + 1)[:, None]
    phases = 2 * math.pi * orders * time / (2 * WINDOW)
    basis = torch.cat([phases.cos(), phases.sin()]) * torch.hann_window(WINDOW)
    with torch.no_grad():
        t.model.encoder.weight.copy_(basis[:, None] / WINDOW**0.5)
        t.model.decoder.weight.copy_(torch.linalg.pinv(basis).T[:, None])
    t.model.encoder.requires_grad_(False)
    t.model.decoder.requires_grad_(False)
    t.optimize, t.steps = (lambda p: torch.optim.Adam(p, 5e-3)), 400
    return t


class Asked(separation.Separator):
    """One mask, for the voice of a second recording: its summary scales the features of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Conv1d(CHANNELS, CHANNELS, 1)
        self.summary = nn.Sequential(nn.Conv1d(1, 24, WINDOW, WINDOW // 2), nn.ReLU(), nn.Conv1d(24, 24, 3), nn.ReLU())
        self.scale = nn.Linear(24, CHANNELS)

    def forward(self, mixture, example):
        encoded = self.encoder(mixture[:, None])
        features = encoded
        wanted = 2 * self.scale(self.summary(example[:, None]).mean(2)).sigmoid()[..., None]
        for layer in self.layers:
            features = layer(features) * wanted
        return self.decoder(self.sigmoid(self.mask(features)) * encoded)[:, 0]


@healthy
def voice_asked_for() -> Training:
    """Another recording says which of both voices is wanted; one output, its SI-SDR, Adam, clipping."""
    t = separation.build(88)
    t.model, t.steps, plain = Asked(), 400, t.sample
    t.optimize = lambda p: torch.optim.Adam(p, 4e-3)

    def by_pitch(references: torch.Tensor) -> torch.Tensor:
        power = torch.fft.rfft(references).abs().square()
        return (power * torch.arange(power.shape[-1])).sum(-1).div(power.sum(-1)).argsort(1)

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        _, others = plain(step + 100_000, phase)
        items = torch.arange(len(mixture))
        wanted = (items + step) % 2
        return (
            mixture,
            references[items, by_pitch(references)[items, wanted]],
            others[items, by_pitch(others)[items, wanted]],
        )

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0], batch[2])
        return {"loss": -si_sdr(outputs, batch[1]).mean(), "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: {"si_sdr_db": float(si_sdr(tensors["outputs"], batch[1]).mean())}
    return t


# -- enhancement -----------------------------------------------------------------------------------------------------


class Adversarial(nn.Module):
    """An enhancer, and a critic that tells its results from clean spectra."""

    def __init__(self) -> None:
        super().__init__()
        self.enhancer = enhancement.Enhancer()
        self.critic = nn.Sequential(
            nn.Conv1d(BINS, 32, 5, 2),
            nn.LeakyReLU(0.2),
            nn.Conv1d(32, 32, 5, 2),
            nn.LeakyReLU(0.2),
            nn.Conv1d(32, 1, 3),
        )

    def forward(self, noisy):
        return self.enhancer(noisy)


@healthy
def critic_of_spectra() -> Training:
    """Least squares against a critic beside the usual loss: two optimizers, one after the other. Mao et al. 2016,
    arXiv:1611.04076."""
    t = enhancement.build(89)
    t.model = Adversarial()
    t.optimizers = [
        torch.optim.Adam(t.model.enhancer.parameters(), 2e-3, betas=(0.8, 0.99)),
        torch.optim.Adam(t.model.critic.parameters(), 1e-3, betas=(0.8, 0.99)),
    ]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = compressed(outputs, batch[1])
        if model.training:
            loss = loss + 0.005 * (model.critic((outputs + 1e-4) ** 0.3) - 1).square().mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        model, (_, second) = training.model, training.optimizers
        noisy, clean = training.sample(step, "train")
        with torch.no_grad():
            made = model(noisy)
        second.zero_grad()
        real, false = (model.critic((x + 1e-4) ** 0.3) for x in (clean, made))
        ((real - 1).square().mean() + false.square().mean()).backward()
        second.step()
        model.critic.requires_grad_(False)
        seen = plain_update(training, step, observer)
        model.critic.requires_grad_(True)
        return seen

    t.forward, t.update = forward, update
    return t


class Gru(nn.Module):
    """A GRU over frames that says by how much each bin is to be weakened, in logarithms and without a bound."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(BINS)
        self.rnn = nn.GRU(BINS, 48, 2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(48, BINS)
        self.positive = nn.Softplus()

    def forward(self, noisy):
        x = self.norm(torch.log(noisy + 1e-3)).transpose(1, 2)
        return noisy * torch.exp(-self.positive(self.out(self.rnn(x)[0]))).transpose(1, 2)


@healthy
def weakened_in_logarithms() -> Training:
    """A GRU of two layers, BatchNorm of its input, dropout, a Huber loss of logarithms, one cycle of the rate."""
    t = enhancement.build(90)
    t.model, t.clip, t.steps = Gru(), 3.0, 400
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-3)
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 1e-2, 400)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = F.smooth_l1_loss(torch.log(outputs + 0.1), torch.log(batch[1] + 0.1))
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.forward = forward
    return t


class Both(enhancement.Enhancer):
    """Also says for each frame whether anybody speaks."""

    def __init__(self) -> None:
        super().__init__(activation=nn.Mish)
        self.speech = nn.Conv1d(BINS, 1, 1)

    def forward(self, noisy):
        outputs = super().forward(noisy)
        return outputs, self.speech(torch.log(outputs + 0.01))[:, 0]


@healthy
def speech_activity_as_well() -> Training:
    """A second task, one bit a frame, whose rarer class counts more; micro-batches of three, bfloat16, Adam."""
    t = enhancement.build(91)
    t.model, t.accumulate, t.precision, t.steps = Both(), 3, torch.bfloat16, 200
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3)

    def speech(clean: torch.Tensor) -> torch.Tensor:
        return (clean.mean(1) > 0.12).float()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, logits = model(batch[0])
        wanted = speech(batch[1])
        second = F.binary_cross_entropy_with_logits(logits.float(), wanted, pos_weight=torch.tensor(0.5))
        loss = compressed(outputs.float(), batch[1]) + 0.05 * second
        return {"loss": loss, "outputs": outputs.float(), "targets": batch[1], "speech": logits.float()}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right = ((tensors["speech"] > 0).float() == speech(batch[1])).float().mean()
        return {**enhancement.measure(tensors, batch), "speech_accuracy": float(right)}

    t.forward, t.measure = forward, measure
    return t


class Tied(nn.Module):
    """One layer used four times, each time with the input beside it, and a mask that may pass 1."""

    def __init__(self) -> None:
        super().__init__()
        self.into = enhancement.Causal(BINS, WIDTH, nn.RMSNorm, nn.GELU)
        self.again = enhancement.Causal(WIDTH, WIDTH, nn.RMSNorm, nn.GELU)
        self.mask = nn.Conv1d(WIDTH, BINS, 1)

    def forward(self, noisy):
        first = x = self.into(torch.log1p(noisy))
        for _ in range(4):
            x = first + self.again(x)
        return (1.2 * self.mask(x).sigmoid()) * noisy


@healthy
def one_layer_four_times() -> Training:
    """Weights shared over depth, RMS norm, GELU; SGD with Nesterov's momentum; noise from weak to strong in each batch."""
    t = enhancement.build(92)
    t.model, plain = Tied(), t.sample
    t.optimize = lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, nesterov=True, weight_decay=1e-5)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 300)

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        level = torch.linspace(0.3, 1.5, len(noisy))[:, None, None]
        return clean + level * (noisy - clean), clean

    t.sample = sample
    return t
