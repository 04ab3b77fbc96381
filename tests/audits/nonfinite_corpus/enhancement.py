"""Speech enhancement on complex spectra: STFT, a complex mask, power compression, whitening, overlap-add by hand."""

import torch
from torch import nn

from ._case import Run, fault, healthy

nan, inf = float("nan"), float("inf")
SIZE, HOP = 16, 8


class Phase(nn.Module):
    """Divides each bin by its magnitude."""

    def forward(self, spectrum):
        return spectrum / spectrum.abs()


class Compress(nn.Module):
    """Magnitude to the power of 0.3."""

    def forward(self, spectrum):
        return spectrum.abs() ** 0.3


class Level(nn.Module):
    def __init__(self, floor):
        super().__init__()
        self.floor = floor

    def forward(self, spectrum):
        return (10 * torch.log10(spectrum.abs().square())).clamp(min=self.floor)


class Whiten(nn.Module):
    """Rotates real and imaginary part to unit covariance, by the closed form of a 2 x 2 root."""

    def forward(self, spectrum):
        re, im = spectrum.real, spectrum.imag
        rr, ii, ri = (re * re).mean(), (im * im).mean(), (re * im).mean()
        s = torch.sqrt(rr * ii - 1.0001 * ri * ri)
        t = torch.sqrt(rr + ii + 2 * s)
        return torch.complex((ii + s) * re - ri * im, (rr + s) * im - ri * re) / (s * t)


class Synthesis(nn.Module):
    """Overlap-add, divided by the sum of the windows' squares."""

    def __init__(self, window):
        super().__init__()
        self.register_buffer("window", window)

    def forward(self, spectrum):
        frames = torch.fft.irfft(spectrum.transpose(1, 2), n=SIZE) * self.window
        batch, count, _ = frames.shape
        length = (count - 1) * HOP + SIZE
        out, norm = torch.zeros(batch, length), torch.zeros(length)
        for i in range(count):
            out[:, i * HOP : i * HOP + SIZE] += frames[:, i]
            norm[i * HOP : i * HOP + SIZE] += self.window.square()
        return out / norm


class Enhancer(nn.Module):
    def __init__(self, features=None, window=None, normalise=None):
        super().__init__()
        self.register_buffer("window", torch.hann_window(SIZE))
        self.features = features or Level(-80.0)
        self.normalise = normalise or nn.Identity()
        self.net = nn.Sequential(nn.Linear(SIZE // 2 + 1, 12), nn.ELU(), nn.Linear(12, SIZE // 2 + 1))
        self.mask = nn.Parameter(torch.ones(SIZE // 2 + 1, 1, dtype=torch.complex64))
        self.synthesis = Synthesis(torch.hamming_window(SIZE) if window is None else window)

    def forward(self, noisy):
        spectrum = torch.stft(noisy, SIZE, HOP, window=self.window, center=False, return_complex=True)
        spectrum = self.normalise(spectrum)
        features = self.features(spectrum)
        features = torch.view_as_real(features).sum(-1) if features.is_complex() else features
        gain = self.net(features.transpose(1, 2)).transpose(1, 2).sigmoid()
        return self.synthesis(spectrum * gain * self.mask)


def noisy(n=3):
    return torch.randn(n, 80)


def squares(out):
    return out.square().mean()


def silent(item):
    x = noisy()
    x[item] = 0
    return x


@fault("operation", "features", "div", "spectrum / spectrum.abs()", samples=(1,), first_inf="-", first_nan="features")
def phase_of_silence():
    return Run(Enhancer(Phase()), (silent(1),), loss=squares)


@fault("backward", "features", "pow", "** 0.3")
def slope_of_power_compression_at_silence():
    return Run(
        Enhancer(Compress(), normalise=nn.Conv1d(9, 9, 1, bias=False, dtype=torch.complex64)),
        (silent(2),),
        loss=squares,
    )


@fault("parameter", "", parameter="mask", first_inf="-", first_nan="")
def imaginary_part_of_a_complex_parameter_is_NaN():
    model = Enhancer()
    torch.view_as_real(model.mask.data)[4, 0, 1] = nan
    return Run(model, (noisy(),), loss=squares)


@fault("operation", "synthesis", "div", "out / norm", samples=(0, 1, 2))
def window_that_is_zero_at_its_ends():
    return Run(Enhancer(window=torch.hann_window(SIZE)), (noisy(),), loss=squares)


@fault("buffer", "", parameter="window", first_inf="-")
def analysis_window_from_a_broken_checkpoint():
    model = Enhancer()
    model.window[3] = nan
    return Run(model, (noisy(),), loss=squares)


@fault("operation", "normalise", "sqrt", "torch.sqrt(rr * ii", first_inf="-", first_nan="normalise")
def whitening_of_a_spectrum_that_is_real():
    class Line(nn.Module):
        def forward(self, spectrum):
            return Whiten.forward(self, torch.complex(spectrum.real, spectrum.real))

    return Run(Enhancer(normalise=Line()), (noisy(),))


class InPlace(nn.Module):
    """Scales the real part, a view, to the loudest of each item."""

    def forward(self, spectrum):
        spectrum = spectrum.clone()
        spectrum.real.div_(spectrum.real.amax(dim=(1, 2), keepdim=True))
        return spectrum


@fault("operation", "normalise", "div", "spectrum.real.div_", samples=(0,), first_inf="-")
def real_part_of_silence_scaled_in_place():
    return Run(Enhancer(normalise=InPlace()), (silent(0),), loss=squares)


@fault("operation", "features", "mul|pow|square", "spectrum.abs().square()", samples=(1,), first_inf="features")
def power_overflows():
    x = noisy()
    x[1] *= 1e21
    return Run(Enhancer(Level(-80.0)), (x,))


@fault("input", samples=(2,), first_inf="-")
def NaN_in_one_waveform():
    x = noisy()
    x[2, 40] = nan
    return Run(Enhancer(), (x,), loss=squares)


@healthy
def level_of_silence_clamped_from_below():
    return Run(Enhancer(), (silent(1),), loss=None)


@healthy
def enhancement_in_training():
    return Run(Enhancer(), (noisy(),), loss=squares)


class Angle(nn.Module):
    def forward(self, spectrum):
        return torch.where(spectrum.abs() > 0, spectrum / spectrum.abs(), 0)


@healthy
def phase_of_silence_put_to_zero():
    return Run(Enhancer(Angle()), (silent(1),), loss=squares)


@healthy
def waveform_with_a_NaN_that_is_cut_away():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Enhancer()

        def forward(self, noisy):
            return self.inner(noisy[:, :80])

    x = torch.cat([noisy(), torch.full((3, 4), nan)], 1)
    return Run(Cut(), (x,), loss=squares)
