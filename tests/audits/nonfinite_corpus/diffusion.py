"""A diffusion UNet: time embedding, residual blocks that down and up path share, a noise schedule, adaptive weights."""

import torch
from torch import nn
from torch.nn import functional as F

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")


class Time(nn.Module):
    def __init__(self, width, base=1e4):
        super().__init__()
        self.width, self.base = width, base

    def forward(self, t):
        rate = self.base ** (-torch.arange(self.width // 2) / (self.width // 2))
        return torch.cat([torch.sin(t[:, None] * rate), torch.cos(t[:, None] * rate)], 1)


class FastNorm(nn.Module):
    """Variance as mean of squares less square of mean, as fused kernels do."""

    def forward(self, x):
        mean, square = x.mean(dim=(1, 2), keepdim=True), x.square().mean(dim=(1, 2), keepdim=True)
        return (x - mean) * (square - mean.square() + 1e-5).rsqrt()


class Res(nn.Module):
    def __init__(self, channels, norm=None):
        super().__init__()
        self.norm = norm or nn.GroupNorm(2, channels)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.time = nn.Linear(8, channels)

    def forward(self, x, embedding):
        return x + self.conv(F.silu(self.norm(x))) + self.time(embedding)[:, :, None]


class Root(nn.Module):
    """Square root of what `shift` leaves: only the second call of the block that holds it sees negative values."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        return torch.sqrt(x - 2.5) if x.amin() < 2 else x


class Weighting(nn.Module):
    """Divides the loss by a moving average of itself, kept as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.average = torch.ones(())

    def forward(self, error):
        self.average = 0.9 * self.average + 0.1 * error.detach().mean()
        return error / self.average


class UNet(nn.Module):
    def __init__(self, channels=4, norm=None):
        super().__init__()
        self.embed = Time(8)
        self.inp, self.out = nn.Conv1d(1, channels, 3, padding=1), nn.Conv1d(channels, 1, 3, padding=1)
        self.block, self.middle = Res(channels), Res(channels, norm)
        self.gamma = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x, t):
        embedding = self.embed(t)
        high = self.block(self.inp(x), embedding)
        low = self.middle(F.avg_pool1d(high, 2) * self.gamma, embedding)
        return self.out(self.block(high + F.interpolate(low, scale_factor=2.0), embedding))


class Diffusion(nn.Module):
    """Noises, denoises, and weighs the error by the signal-to-noise ratio; returns a dictionary with the loss."""

    def __init__(self, unet=None, weighting=None):
        super().__init__()
        self.unet, self.weighting = unet or UNet(), weighting or nn.Identity()
        self.register_buffer("alpha", torch.linspace(1.0, 0.01, 10))

    def forward(self, clean, t, noise):
        alpha = self.alpha[t][:, None, None]
        guess = self.unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, t)
        error = (guess - noise).square().mean(dim=(1, 2))
        snr = self.alpha[t] / (1 - self.alpha[t])
        return {"loss": self.weighting(error * snr.clamp(max=5)).mean(), "guess": guess, "snr": snr}


def batch(t=(3, 5, 7)):
    return torch.randn(3, 1, 16), torch.tensor(t), torch.randn(3, 1, 16)


def given(out):
    return out["loss"]


def squares(out):
    return out.square().mean()


@fault("operation", "", "div", "(1 - self.alpha[t])", samples=(1,), first_inf="", first_nan="-")
def signal_to_noise_ratio_without_noise():
    return Run(Diffusion(), batch((3, 0, 7)))


@fault("parameter", "", parameter="gamma", first_inf="middle.norm")
def absurd_gain_overflows_in_the_variance_of_the_next_module():
    model = UNet(norm=FastNorm())
    model.gamma.data[2] = 1e30
    return Run(model, (torch.randn(3, 1, 16), torch.tensor([1, 2, 3])))


@fault("buffer", "weighting", parameter="weighting.average", first_nan="weighting")
def moving_average_of_the_loss_is_NaN_from_an_earlier_step():
    model = Diffusion(weighting=Weighting())
    model.weighting.average = torch.tensor(nan)
    return Run(model, batch(), loss=given)


@fault("operation", "block.norm", "sqrt", "torch.sqrt(x - 2.5)", call=1, first_inf="-", first_nan="block.norm")
def second_call_of_the_block_on_the_way_up():
    class Shifted(UNet):
        def forward(self, x, t):
            embedding = self.embed(t)
            high = self.block(self.inp(x) * 0 + 3, embedding * 0)
            return self.out(self.block(high * 0 + 1, embedding))

    model = Shifted()
    model.block.norm = Root()
    return Run(model, (torch.randn(3, 1, 16), torch.tensor([1, 2, 3])))


@fault("operation", "embed", "pow", "self.base **", first_inf="embed")
def frequencies_overflow():
    model = UNet()
    model.embed = Time(8, base=1e-60)
    return Run(model, (torch.randn(3, 1, 16), torch.tensor([1, 2, 3])))


@fault("backward", "", line=".float()|* 2.0**30", operation="_to_copy|mul")
def loss_scale_overflows_the_gradient_in_half_precision():
    return Run(
        UNet(),
        (torch.randn(3, 1, 16), torch.tensor([1, 2, 3])),
        loss=lambda out: out.float().square().mean() * 2.0**30,
        context=lambda: torch.autocast("cpu", torch.float16),
    )


@fault("parameter", "middle.conv", parameter="middle.conv.weight", first_inf="middle.conv")
def infinite_weight_in_a_convolution():
    model = UNet()
    model.middle.conv.weight.data[1, 2, 0] = inf
    return Run(model, (torch.randn(3, 1, 16), torch.tensor([1, 2, 3])), loss=squares)


@fault("input", samples=(0,), first_inf="-")
def noise_given_as_third_input_has_a_NaN():
    clean, t, noise = batch()
    noise[0, 0, 9] = nan
    return Run(Diffusion(), (clean, t, noise), loss=given)


@fault("buffer|parameter", parameter="alpha", first_inf="-")
def schedule_with_a_NaN_at_one_time_only():
    model = Diffusion()
    model.alpha[5] = nan
    return Run(model, batch(), loss=given)


@healthy
def ratio_that_is_infinite_but_clamped():
    class Clamped(Diffusion):
        def forward(self, clean, t, noise):
            return {"loss": super().forward(clean, t, noise)["loss"]}

    return Run(Clamped(), batch((3, 0, 7)), loss=given)


@healthy
def diffusion_in_training():
    return Run(Diffusion(weighting=Weighting()), batch(), loss=given)


@healthy
def directions_of_zero_vectors_with_eps():
    class Unit(UNet):
        def forward(self, x, t):
            return F.normalize(super().forward(x, t) * 0, dim=-1)

    return Run(Unit(), (torch.randn(3, 1, 16), torch.tensor([1, 2, 3])), loss=squares)


@healthy
def best_loss_starts_at_infinity():
    class Best(UNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("best", torch.tensor(inf))

        def forward(self, x, t):
            out = super().forward(x, t)
            self.best = torch.minimum(self.best, out.detach().square().mean())
            return out

    return Run(Best(), (torch.randn(3, 1, 16), torch.tensor([1, 2, 3])), loss=squares)


@healthy
def dropout_of_everything():
    class Dropped(UNet):
        def forward(self, x, t):
            return F.dropout(super().forward(x, t), p=1.0, training=True)

    return Run(Dropped(), (torch.randn(3, 1, 16), torch.tensor([1, 2, 3])), loss=squares)
