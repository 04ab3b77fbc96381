"""Programs for healthy runs of other kinds: diffusion, a flow, raw signals, a U-Net, complex spectra, a policy, a sparse code."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults import autoencoder
from faults._training import Batch, Tensors, Training, seeded

TIME = torch.arange(128) / 128


def training(model: nn.Module, draw, forward, measure, optimize, seed: int = 0, **options) -> Training:
    """`draw(generator) -> batch`, anew for each step."""
    return Training(model, lambda step, phase: draw(seeded(seed, step, len(phase))), forward, measure, optimize, **options)  # fmt: skip


def waves(n: int, generator: torch.Generator) -> torch.Tensor:
    """Two tones of random pitch, phase and level: (batch, 128)."""
    pitch = 3 + 12 * torch.rand(n, 2, 1, generator=generator)
    phase = 6.3 * torch.rand(n, 2, 1, generator=generator)
    level = 0.2 + 0.3 * torch.rand(n, 2, 1, generator=generator)
    return (level * torch.sin(2 * math.pi * pitch * TIME + phase)).sum(1)


# -- diffusion -------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Tells the noise in a point at a time between 0 (none) and 1 (nothing else). Source: Ho et al. 2020, arXiv:2006.11239."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 48), nn.SiLU())
        self.first, self.second = nn.Linear(2, 48), nn.Linear(48, 48)
        self.norm, self.activation, self.out = nn.LayerNorm(48), nn.SiLU(), nn.Linear(48, 2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, time):
        angles = time * 2.0 ** torch.arange(4)
        x = self.first(x) + self.time(torch.cat([angles.sin(), angles.cos()], 1))
        return self.out(x + self.activation(self.second(self.norm(self.activation(x)))))


def diffusion() -> Training:
    torch.manual_seed(1)

    def draw(made: torch.Generator) -> Batch:
        angle = 6.2832 * torch.rand(128, 1, generator=made)
        clean = torch.cat([angle.cos(), 2 * angle.cos() * angle.sin()], 1)
        time, noise = torch.rand(128, 1, generator=made), torch.randn(128, 2, generator=made)
        kept = torch.cos(time * math.pi / 2)
        return kept * clean + (1 - kept.square()).sqrt() * noise, time, noise

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0], batch[1])
        return {"loss": F.mse_loss(outputs, batch[2]), "outputs": outputs, "targets": batch[2]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"noise_left": float((tensors["outputs"] - batch[2]).square().mean())}

    return training(Denoiser(), draw, forward, measure, lambda p: torch.optim.AdamW(p, 2e-3), steps=400)


# -- normalising flow ------------------------------------------------------------------------------------------------


class Coupling(nn.Module):
    """One half scales and shifts the other. Source: Dinh et al. 2017, arXiv:1605.08803."""

    def __init__(self, flipped: bool) -> None:
        super().__init__()
        self.flipped = flipped
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x):
        kept, moved = x.flip(1).chunk(2, 1) if self.flipped else x.chunk(2, 1)
        log_scale, shift = self.net(kept).chunk(2, 1)
        log_scale = torch.tanh(log_scale / 2)
        return torch.cat([moved * log_scale.exp() + shift, kept], 1), log_scale.sum(1)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(i % 2 == 1) for i in range(5))

    def forward(self, x):
        """Codes, and the log-likelihood of each item in nats."""
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, change = layer(x)
            total = total + change
        return x, total - 0.5 * (x.square() + math.log(2 * math.pi)).sum(1)


def flow() -> Training:
    torch.manual_seed(1)

    def draw(made: torch.Generator) -> Batch:
        x = 0.3 * torch.randn(256, 4, generator=made)
        x[:, 2:] = 0.5 * x[:, 2:] + torch.sin(2 * x[:, :2])
        return (x,)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        codes, likelihood = model(batch[0])
        return {"loss": -likelihood.mean(), "codes": codes}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"bits_per_dim": float(tensors["loss"]) / 4 / math.log(2)}

    return training(Flow(), draw, forward, measure, lambda p: torch.optim.Adamax(p, 2e-3))


# -- raw signals -----------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A causal convolution with gates. Source: van den Oord et al. 2016 (WaveNet), arXiv:1609.03499."""

    def __init__(self, dilation: int, width: int = 24) -> None:
        super().__init__()
        self.padding = dilation
        self.conv = nn.Conv1d(width, 2 * width, 2, dilation=dilation)
        self.tanh, self.sigmoid, self.out = nn.Tanh(), nn.Sigmoid(), nn.Conv1d(width, width, 1)

    def forward(self, x):
        value, gate = self.conv(F.pad(x, (self.padding, 0))).chunk(2, 1)
        return x + self.out(self.tanh(value) * self.sigmoid(gate))


class Raw(nn.Module):
    def __init__(self, levels: int = 16, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(levels, width)
        self.layers = nn.Sequential(*(Gated(2**i, width) for i in range(5)))
        self.activation, self.head = nn.ReLU(), nn.Conv1d(width, levels, 1)

    def forward(self, samples):
        return self.head(self.activation(self.layers(self.embedding(samples).transpose(1, 2)))).transpose(1, 2)


def raw_signal() -> Training:
    torch.manual_seed(1)

    def draw(made: torch.Generator) -> Batch:
        levels = ((waves(8, made) + 1) * 8).long().clamp(0, 15)
        return levels[:, :-1], levels[:, 1:]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()), "logits": logits, "targets": batch[1]}  # fmt: skip

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"accuracy": float((tensors["logits"].argmax(-1) == batch[1]).float().mean())}

    return training(Raw(), draw, forward, measure, lambda p: torch.optim.NAdam(p, 3e-3))


# -- a U-Net ---------------------------------------------------------------------------------------------------------


def stage(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inputs, outputs, 5, stride, 2), nn.InstanceNorm1d(outputs, affine=True), nn.GELU())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = stage(1, 12), stage(12, 16, 2), stage(16, 24, 2)
        self.up1, self.up2 = nn.ConvTranspose1d(24, 16, 4, 2, 1), nn.ConvTranspose1d(16, 12, 4, 2, 1)
        self.mix1, self.mix2, self.out = stage(32, 16), stage(24, 12), nn.Conv1d(12, 1, 1)

    def forward(self, x):
        first = self.down1(x[:, None])
        second = self.down2(first)
        x = self.up1(self.down3(second))
        x = self.up2(self.mix1(torch.cat([x, second], 1)))
        return self.out(self.mix2(torch.cat([x, first], 1)))[:, 0]


def decibels(outputs: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio."""
    error = (outputs - clean).square().sum(-1)
    return (10 * torch.log10(clean.square().sum(-1) / (error + 1e-8) + 1e-8)).mean()


def noisy_waves(made: torch.Generator) -> Batch:
    clean = waves(8, made)
    return clean + 0.4 * torch.randn(clean.shape, generator=made), clean


def unet() -> Training:
    """The loss is a ratio in dB, and becomes negative."""
    torch.manual_seed(1)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": -decibels(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"snr_db": float(decibels(tensors["outputs"], batch[1]))}

    return training(UNet(), noisy_waves, forward, measure, lambda p: torch.optim.RAdam(p, 3e-3))


# -- complex spectra -------------------------------------------------------------------------------------------------


class ComplexMask(nn.Module):
    """A complex mask on a short-time spectrum, made from its real and imaginary parts."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.size, bins = size, size // 2 + 1
        self.register_buffer("window", torch.hann_window(size))
        self.conv1, self.norm = nn.Conv1d(2 * bins, 48, 3, padding=1), nn.RMSNorm(48)
        self.activation, self.conv2 = nn.PReLU(), nn.Conv1d(48, 2 * bins, 3, padding=1)

    def forward(self, x):
        spectrum = torch.stft(x, self.size, self.size // 4, window=self.window, return_complex=True)
        parts = self.conv1(torch.cat([spectrum.real, spectrum.imag], 1))
        parts = self.activation(self.norm(parts.transpose(1, 2)).transpose(1, 2))
        real, imaginary = torch.tanh(self.conv2(parts)).chunk(2, 1)
        masked = torch.complex(real, imaginary) * spectrum
        return torch.istft(masked, self.size, self.size // 4, window=self.window, length=x.shape[-1])


def complex_spectra() -> Training:
    torch.manual_seed(1)

    def distance(a: torch.Tensor, b: torch.Tensor, size: int) -> torch.Tensor:
        """L1 of compressed magnitudes and of complex values."""
        window = torch.hann_window(size)
        a, b = (torch.stft(x, size, size // 4, window=window, return_complex=True) for x in (a, b))
        return ((a.abs() + 1e-3).log() - (b.abs() + 1e-3).log()).abs().mean() + (a - b).abs().mean()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = sum(distance(outputs, batch[1], size) for size in (16, 32, 64))
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"snr_db": float(decibels(tensors["outputs"], batch[1]))}

    return training(ComplexMask(), noisy_waves, forward, measure, lambda p: torch.optim.AdamW(p, 2e-3), clip=10.0)


# -- a policy --------------------------------------------------------------------------------------------------------


def policy() -> Training:
    """REINFORCE with a learned baseline: the loss goes up and down around zero, the reward rises. Source: Williams 1992."""
    torch.manual_seed(1)
    good = torch.randn(6, 5, generator=seeded(57))
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 6))

    def draw(made: torch.Generator) -> Batch:
        return torch.randn(64, 6, generator=made), torch.rand(64, 5, generator=made)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        scores, value = model(batch[0]).split([5, 1], 1)
        action = (scores - (-batch[1].log()).log()).argmax(1)  # Gumbel: a draw from the softmax
        reward = ((batch[0] @ good).argmax(1) == action).float()
        advantage = reward - value[:, 0]
        chosen = scores.log_softmax(1)[torch.arange(len(action)), action]
        loss = -(chosen * advantage.detach()).mean() + advantage.square().mean()
        return {"loss": loss, "reward": reward.mean()}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"reward": float(tensors["reward"])}

    return training(model, draw, forward, measure, lambda p: torch.optim.Adam(p, 1e-2), steps=400)


# -- a code of many units, few of them at a time ---------------------------------------------------------------------


class Dictionary(nn.Module):
    """Eight of 64 ReLU units for each item. Source: Makhzani and Frey 2014, arXiv:1312.5663."""

    def __init__(self, units: int = 64, kept: int = 8) -> None:
        super().__init__()
        self.kept = kept
        self.encoder, self.activation = nn.Linear(autoencoder.WIDTH, units), nn.ReLU()
        self.decoder = nn.Linear(units, autoencoder.WIDTH)
        with torch.no_grad():
            self.encoder.weight.copy_(F.normalize(self.decoder.weight.T, dim=1))

    def forward(self, x):
        code = self.activation(self.encoder(x))
        return self.decoder(code * (code >= code.topk(self.kept, -1).values[:, -1:]))


# -- weights of four bits --------------------------------------------------------------------------------------------


class FourBits(nn.Module):
    """Rounds weights in the forward pass only. Source: Bengio et al. 2013, arXiv:1308.3432."""

    def forward(self, weight):
        step = weight.detach().abs().max() / 7
        return weight + ((weight / step).round() * step - weight).detach()
