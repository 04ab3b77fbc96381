"""A variational autoencoder with a vector quantiser beside its Gaussian bottleneck."""

import torch
from torch import nn
from torch.nn import functional as F

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")


class Gaussian(nn.Module):
    """Samples from N(mean, exp(logvar))."""

    def forward(self, mean, logvar):
        sigma = torch.exp(0.5 * logvar)
        return mean + sigma * torch.randn_like(sigma)


class Rectified(nn.Module):
    """The root of a variance from a ReLU, whose backward pass is a choice and no product: it stops an infinite slope."""

    def forward(self, mean, logvar):
        return mean + F.relu(logvar).sqrt()


class Squared(nn.Module):
    """The root of a variance that is a square."""

    def forward(self, mean, logvar):
        variance = logvar.square()
        return mean + variance.sqrt()


def collapsed(bottleneck):
    """The second half of what the encoder gives is exactly zero."""
    model = VAE(bottleneck)
    model.encoder[2].weight.data[4:] = 0
    model.encoder[2].bias.data[4:] = 0
    return model


class Quantiser(nn.Module):
    """Nearest code; in train mode codes follow their items by moving averages of counts and sums."""

    def __init__(self, codes, width):
        super().__init__()
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("sums", self.codes.clone())
        self.decay = 0.9

    def forward(self, z):
        nearest = torch.cdist(z, self.codes).argmin(1)
        chosen = self.codes[nearest]
        if self.training:
            with torch.no_grad():
                hits = F.one_hot(nearest, len(self.codes)).to(z)
                self.count.mul_(self.decay).add_(hits.sum(0), alpha=1 - self.decay)
                self.sums.mul_(self.decay).add_(hits.t() @ z, alpha=1 - self.decay)
                self.codes.copy_(self.sums / self.count[:, None])
        return z + (chosen - z).detach()


class VAE(nn.Module):
    def __init__(self, bottleneck=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 8))
        self.bottleneck = bottleneck or Gaussian()
        self.quantiser = Quantiser(6, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x):
        mean, logvar = self.encoder(x).chunk(2, -1)
        z = self.bottleneck(mean, logvar)
        return self.decoder(self.quantiser(z)), mean, logvar


def x(n=5):
    return torch.randn(n, 10)


def divergence(out):
    _, mean, logvar = out
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1).mean()


def elbo(target):
    return lambda out: (out[0] - target).square().sum(-1).mean() + 0.1 * divergence(out)


@fault("operation", "bottleneck", "exp", "torch.exp(0.5 * logvar)", samples=(0, 1, 2, 3, 4), first_inf="bottleneck")
def log_variance_explodes():
    model = VAE().eval()
    model.encoder[2].bias.data[6] = 300
    return Run(model, (x(),))


@fault("loss", "", "exp", "logvar.exp()")
def divergence_overflows_where_the_sample_does_not():
    model = VAE()
    model.encoder[2].bias.data[6] = 90
    return Run(model, (x(),), loss=divergence)


@fault("backward", "bottleneck", "sqrt", "variance.sqrt()")
def root_of_a_variance_that_is_zero():
    data = x()
    return Run(collapsed(Squared()), (data,), loss=lambda out: (out[0] - data).square().mean())


@healthy
def infinite_slope_stopped_by_a_relu():
    data = x()
    return Run(collapsed(Rectified()), (data,), loss=lambda out: (out[0] - data).square().mean())


@fault("backward", "", "sqrt|pow", "distance.sqrt()")
def where_hides_a_root_in_the_loss():
    data = x()

    def loss(out):
        distance = (out[0] - data).square().sum(-1) * torch.tensor([1.0, 1, 0, 1, 1])
        return torch.where(distance > 0, distance.sqrt(), 0.0).mean()

    return Run(VAE(), (data,), loss=loss)


@fault("parameter", "decoder.0", parameter="decoder.0.weight", first_inf="decoder.0")
def weight_of_3e38():
    model = VAE().eval()
    model.encoder[2].weight.data *= 50
    model.decoder[0].weight.data[2, 1] = 3e38
    return Run(model, (x(),))


@fault("operation", "quantiser", "div", "self.sums / self.count")
def code_that_nobody_hits_spoils_the_codebook():
    model, data = VAE(), x()
    model.quantiser.decay = 0.0
    return Run(model, (data,), loss=elbo(data))


@fault("buffer", "quantiser", parameter="quantiser.codes", first_nan="quantiser")
def codebook_is_NaN_from_an_earlier_batch():
    model = VAE().eval()
    model.quantiser.codes[:] = nan
    return Run(model, (x(),))


class Softplus(nn.Module):
    """Starts a scale at the inverse of softplus of `scale`."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.inner = VAE()

    def forward(self, x):
        raw = torch.log(torch.expm1(torch.full_like(x, self.scale)))
        return self.inner(x * F.softplus(raw))


@fault("operation", "", "expm1", "torch.expm1", first_inf="")
def inverse_of_softplus_overflows():
    return Run(Softplus(100.0), (x(),))


@fault("backward", "", "log|xlogy", "guess.log()")
def gradient_of_x_log_x_at_zero():
    """x log x with a masked value: log is finite since it was clamped from below by where, but its slope is not."""
    data = x()

    def loss(out):
        guess = out[0].relu() * 0
        return torch.where(guess > 0, guess * guess.log(), 0.0).sum()

    return Run(VAE(), (data,), loss=loss)


@healthy
def entropy_of_certain_outcomes():
    def loss(out):
        probability = (out[0] * 1000).softmax(-1)
        return torch.special.entr(probability.detach()).sum() + out[0].square().mean()

    return Run(VAE(), (x(),), loss=loss)


@healthy
def logarithm_of_zero_clamped():
    def loss(out):
        return -F.relu(out[0].detach()).log().clamp(min=-10).mean() + out[1].square().mean()

    return Run(VAE(), (x(),), loss=loss)


@healthy
def saturated_binary_cross_entropy():
    return Run(
        VAE().eval(),
        (x(),),
        loss=lambda out: F.binary_cross_entropy((out[0] * 1e4).sigmoid(), (out[0] < 0).float()),
    )


@healthy
def training_of_the_codebook():
    data = x()
    return Run(VAE(), (data,), loss=elbo(data))


@healthy
def gradient_overwritten_by_a_hook():
    model, data = collapsed(Squared()), x()

    def clean(module, arguments):
        logvar = arguments[1]
        if logvar.requires_grad:
            logvar.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))

    model.bottleneck.register_forward_pre_hook(clean)
    return Run(model, (data,), loss=lambda out: (out[0] - data).square().mean())
