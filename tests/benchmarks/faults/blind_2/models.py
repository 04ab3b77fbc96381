"""Networks of the healthy runs in `healthy.py`, each as people build it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from faults import autoencoder, classifier, enhancement, forecaster, language, recogniser


class Residual(nn.Module):
    """A block around which its input is added; the gain of its last normalisation starts at zero. Goyal et al. 2017,
    arXiv:1706.02677."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x):
        y = self.activation(self.norm1(self.conv1(x)))
        return self.activation(x + self.norm2(self.conv2(y)))


class WithTeacher(classifier.Classifier):
    """A classifier that has its own running average as a part. Tarvainen and Valpola 2017, arXiv:1703.01780."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.teacher = copy.deepcopy(classifier.Classifier(dropout=0.2)).requires_grad_(False)
        self.teacher.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("teacher")})


class Quantised(nn.Module):
    """The nearest of 16 directions, with the gradient handed past it. van den Oord et al. 2017, arXiv:1711.00937; Yu et al. 2021,
    arXiv:2110.04627."""

    def __init__(self, codes: int = 16, width: int = 4) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(codes, width))

    def forward(self, x):
        x, codes = F.normalize(x), F.normalize(self.codes)
        nearest = codes[torch.cdist(x, codes).argmin(1)]
        distance = F.mse_loss(nearest, x.detach()) + 0.25 * F.mse_loss(x, nearest.detach())
        return x + (nearest - x).detach(), distance


class Coded(autoencoder.Autoencoder):
    """Returns the distance of the code from its nearest direction, too."""

    def __init__(self) -> None:
        super().__init__()
        self.quantise = Quantised()

    def forward(self, x):
        code, distance = self.quantise(self.encoder(x))
        return self.decoder(code), distance


class ReZero(nn.Module):
    """Branches without normalisation, times a factor that starts at zero. Bachlechner et al. 2020, arXiv:2003.04887."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = language.Attention()
        self.mlp = nn.Sequential(
            nn.Linear(language.WIDTH, 2 * language.WIDTH), nn.GELU(), nn.Linear(2 * language.WIDTH, language.WIDTH)
        )
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        x = x + self.factor * self.attention(x)
        return x + self.factor * self.mlp(x)


class PostNorm(nn.Module):
    """Normalisation behind the sum, as in the first transformers. Vaswani et al. 2017, arXiv:1706.03762."""

    def __init__(self, block: language.Block) -> None:
        super().__init__()
        self.attention, self.mlp, self.norm1, self.norm2 = block.attention, block.mlp, block.norm1, block.norm2

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class Masked(nn.Module):
    """A transformer that sees both sides and fills in what is hidden. Devlin et al. 2018, arXiv:1810.04805."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(language.TOKENS + 1, language.WIDTH)
        self.position = nn.Embedding(language.TIME, language.WIDTH)
        layer = nn.TransformerEncoderLayer(
            language.WIDTH, language.HEADS, 2 * language.WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(language.WIDTH, language.TOKENS)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens) + self.position.weight))


class Attentive(recogniser.Recogniser):
    """A transformer layer with a table of positions in place of the recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(0.1 * torch.randn(recogniser.FRAMES // 2, 32))
        self.gru = nn.Identity()
        self.mixer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, "relu", batch_first=True, norm_first=True)
        self.head = nn.Linear(32, recogniser.SYMBOLS)

    def forward(self, x):
        x = self.activation(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.mixer(self.norm(x) + self.position))


class Gate(nn.Module):
    """Half of the channels through a sigmoid open and shut the others. Dauphin et al. 2017, arXiv:1612.08083."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(enhancement.WIDTH, 2 * enhancement.WIDTH, 3)
        self.glu = nn.GLU(1)

    def forward(self, x):
        return self.glu(self.conv(F.pad(x, (2, 0))))


class Gaussian(forecaster.Forecaster):
    """A mean and a deviation for each hour."""

    def __init__(self) -> None:
        super().__init__()
        self.deviation = nn.Linear(self.head.in_features, forecaster.HORIZON)

    def forward(self, x):
        states = self.norm(self.lstm(self.activation(self.project(x)))[0][:, -1])
        return self.head(states), F.softplus(self.deviation(states)) + 1e-3


class Patches(nn.Module):
    """A transformer over patches of six hours. Nie et al. 2022, arXiv:2211.14730."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.project = nn.Linear(6 * forecaster.FEATURES, width)
        self.position = nn.Parameter(0.02 * torch.randn(forecaster.PAST // 6, width))
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 4, 64, 0.1, "gelu", batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(forecaster.PAST // 6 * width, forecaster.HORIZON)

    def forward(self, x):
        return self.head(self.layers(self.project(x.unflatten(1, (-1, 6)).flatten(2)) + self.position).flatten(1))


class Reversible(forecaster.Forecaster):
    """Each window is standardised within the model, and what comes out is scaled back. Kim et al. 2022, ICLR."""

    def forward(self, x):
        value = x[..., :1]
        mean, deviation = value.mean(1, keepdim=True), value.std(1, keepdim=True) + 1e-5
        outputs = super().forward(torch.cat([(value - mean) / deviation, x[..., 1:]], -1))
        return outputs * deviation[..., 0] + mean[..., 0]
