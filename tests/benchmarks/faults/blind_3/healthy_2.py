"""Runs with nothing wrong: autoencoders of many kinds, representations without labels, translators."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import autoencoder, translator
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded

WIDTH, LATENT = autoencoder.WIDTH, autoencoder.LATENT

# -- translators -----------------------------------------------------------------------------------------------------


@healthy
def plain_translator() -> Training:
    """AdamW, warm-up, clipping, teacher forcing, padding."""
    return translator.build(81)


@healthy
def one_table_and_smoothing() -> Training:
    """The target's table is the head as well; labels are smoothed; padding is a token of the targets that the loss ignores."""
    t = translator.build(82, dropout=0.1)
    t.model.head = nn.Linear(translator.WIDTH, translator.WORDS, bias=False)
    t.model.head.weight = t.model.target.table.weight
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        source, previous, following = plain(step, phase)
        return source, previous, following.clamp(min=translator.PAD)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten(), ignore_index=0, label_smoothing=0.1)
        return {"loss": loss, "logits": logits, "targets": batch[2]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        hit = tensors["logits"].argmax(-1) == batch[2]
        return {"accuracy": float(hit[batch[2] > 0].float().mean())}

    t.sample, t.forward, t.measure = sample, forward, measure
    return t


class Recurrent(nn.Module):
    """A packed GRU of both directions, a GRU that goes on from where it ends, additive attention. Bahdanau et al. 2014,
    arXiv:1409.0473."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.source = nn.Embedding(translator.WORDS, width, padding_idx=translator.PAD)
        self.target = nn.Embedding(translator.WORDS, width, padding_idx=translator.PAD)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * width, 2 * width)
        self.decoder = nn.GRU(width, 2 * width, batch_first=True)
        self.query, self.key, self.score = nn.Linear(2 * width, width), nn.Linear(2 * width, width), nn.Linear(width, 1)
        self.softmax, self.dropout = nn.Softmax(-1), nn.Dropout(0.1)
        self.head = nn.Linear(4 * width, translator.WORDS)

    def forward(self, source, previous):
        lengths = (source != translator.PAD).sum(1)
        packed = pack_padded_sequence(self.source(source), lengths, batch_first=True, enforce_sorted=False)
        states, last = self.encoder(packed)
        memory, _ = pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        start = torch.tanh(self.bridge(last.transpose(0, 1).flatten(1)))[None]
        x, _ = self.decoder(self.target(previous), start)
        scores = self.score(torch.tanh(self.query(x)[:, :, None] + self.key(memory)[:, None]))[..., 0]
        shares = self.softmax(scores.masked_fill((source == translator.PAD)[:, None], -1e9))
        return self.head(self.dropout(torch.cat([x, shares @ memory], -1)))


@healthy
def recurrent_translator() -> Training:
    """GRUs and additive attention, Adam with clipping at 1, a rate that is halved every 100 steps."""
    t = translator.build(83)
    t.model = Recurrent()
    t.optimize, t.schedule = (lambda p: torch.optim.Adam(p, 8e-3)), lambda o: LambdaLR(o, lambda step: 0.5 ** (step // 100))  # fmt: skip
    return t


@healthy
def encoder_of_another_language() -> Training:
    """The encoder was trained with another decoder and is frozen; the new decoder learns, the optimizer holds only it."""
    before, t = translator.build(84), translator.build(85)
    optimizer = torch.optim.AdamW(before.model.parameters(), 4e-3)
    for step in range(150):
        optimizer.zero_grad()
        before.forward(before.model, before.sample(step, "train"))["loss"].backward()
        optimizer.step()
    for name in ("source", "encoder", "encoder_norm"):
        part = getattr(t.model, name)
        part.load_state_dict(getattr(before.model, name).state_dict())
        part.requires_grad_(False)
    t.precision = torch.bfloat16
    return t


# -- autoencoders ----------------------------------------------------------------------------------------------------


@healthy
def divergence_warmed_up() -> Training:
    """A variational autoencoder whose divergence gets its full weight, small as it is, over the first 150 steps."""
    t = autoencoder.build(81, activation=nn.SiLU)
    t.model.encoder = autoencoder.mlp((WIDTH, 32, 16, 2 * LATENT), nn.SiLU)
    now = [0]
    t.before.append(lambda training, step: now.__setitem__(0, step))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        mean, log_variance = model.encoder(batch[0]).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp() * model.training
        outputs = model.decoder(code)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        loss = F.mse_loss(outputs, batch[0]) + 0.01 * min(1.0, now[0] / 150) * divergence
        return {"loss": loss, "outputs": outputs, "targets": batch[0], "divergence": divergence}

    t.forward = forward
    return t


class Hidden(nn.Module):
    """Columns are tokens; those that are hidden become one learnt token. He et al. 2021, arXiv:2111.06377."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.value, self.column = nn.Linear(1, width), nn.Parameter(0.3 * torch.randn(WIDTH, width))
        self.token = nn.Parameter(0.02 * torch.randn(width))
        self.mix = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH * width, 64), nn.GELU(), nn.LayerNorm(64), nn.Dropout(0.05))  # fmt: skip
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.head = nn.Linear(64, WIDTH)

    def forward(self, x, hidden):
        tokens = torch.where(hidden[..., None], self.token, self.value(x[..., None])) + self.column
        y = self.mix(tokens)
        return self.head(y + self.body(y))


@healthy
def columns_behind_a_token() -> Training:
    """A third of the columns is hidden behind a learnt token, and only these are told; AdamW, a cosine to zero."""
    t = autoencoder.build(82)
    t.model, plain = Hidden(), t.sample

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        return x, torch.rand(x.shape, generator=seeded(82, step, len(phase))) < 1 / 3

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch)
        loss = F.mse_loss(outputs[batch[1]], batch[0][batch[1]])
        return {"loss": loss, "outputs": outputs, "targets": batch[0]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: {"explained": 1 - float(tensors["loss"] / batch[0][batch[1]].var())}
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.02)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 300)
    return t


class Transposed(nn.Module):
    """The decoder's weights are those of the encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 48), nn.Linear(48, 6)
        self.activation = nn.LeakyReLU(0.1)
        self.biases = nn.ParameterList([torch.zeros(48), torch.zeros(WIDTH)])

    def forward(self, x):
        code = self.second(self.activation(self.first(x)))
        y = self.activation(F.linear(code, self.second.weight.T, self.biases[0]))
        return F.linear(y, self.first.weight.T, self.biases[1])


@healthy
def decoder_is_the_encoder_transposed() -> Training:
    """Tied weights, noise on the inputs, SGD with momentum, micro-batches of 16, a smooth L1 loss."""
    t = autoencoder.build(83)
    t.model, t.accumulate, plain = Transposed(), 2, t.sample
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True)), 2.0

    def sample(step: int, phase: str) -> Batch:
        x = plain(step, phase)[0][:16]
        return x + 0.2 * torch.randn(x.shape, generator=seeded(83, step, len(phase))), x

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.smooth_l1_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: {"explained": 1 - float(F.mse_loss(tensors["outputs"], batch[1]) / batch[1].var())}  # fmt: skip
    return t


class Critic(nn.Module):
    """An autoencoder and a critic that tells its codes from normal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = autoencoder.mlp((WIDTH, 32, 16, LATENT), nn.ELU)
        self.decoder = autoencoder.mlp((LATENT, 16, 32, WIDTH), nn.ELU)
        self.critic = nn.Sequential(nn.Linear(LATENT, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, x):
        code = self.encoder(x)
        return self.decoder(code), code


@healthy
def adversary_of_codes() -> Training:
    """Codes are to look like normal numbers to a critic, which has an optimizer of its own. Makhzani et al. 2015,
    arXiv:1511.05644."""
    t = autoencoder.build(84)
    t.model = Critic()
    own = [*t.model.encoder.parameters(), *t.model.decoder.parameters()]
    t.optimizers = [torch.optim.Adam(own, 2e-3), torch.optim.Adam(t.model.critic.parameters(), 1e-3, betas=(0.5, 0.99))]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, code = model(batch[0])
        fooled = F.softplus(-model.critic(code)).mean()
        error = F.mse_loss(outputs, batch[0])
        return {"loss": error + 0.05 * fooled, "outputs": outputs, "targets": batch[0], "error": error}

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        seen = plain_update(training, step, observer)
        critic, second = training.model.critic, training.optimizers[1]
        with torch.no_grad():
            code = training.model.encoder(seen[0][0])
        normal = torch.randn(code.shape, generator=seeded(84, step))
        second.zero_grad()
        (F.softplus(-critic(normal)).mean() + F.softplus(critic(code)).mean()).backward()
        second.step()
        return seen

    t.forward, t.update = forward, update
    return t


# -- without labels --------------------------------------------------------------------------------------------------


def two_views(t: Training, seed: int) -> None:
    """Two noisy views of each item, each without a fifth of its columns; measure how many find their twin."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, made = plain(step, phase)[0], seeded(seed, step, len(phase))
        views = x + 0.2 * torch.randn(2, *x.shape, generator=made)
        return (views * (torch.rand(views.shape, generator=made) > 0.2)).unbind()

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        first, second = (F.normalize(part, dim=1) for part in tensors["embeddings"].chunk(2))
        return {"twins": float(((first @ second.T).argmax(1) == torch.arange(len(first))).float().mean())}

    t.sample, t.measure = sample, measure


def projector(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, outputs))  # fmt: skip


@healthy
def variance_and_covariance() -> Training:
    """Views agree, each unit varies, units do not follow one another: three weighted terms. Bardes et al. 2021,
    arXiv:2105.04906."""
    t = autoencoder.build(85)
    two_views(t, 85)
    t.model = projector(16)
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 300)

    def spread(z):
        z = z - z.mean(0)
        covariance = z.T @ z / (len(z) - 1)
        deviation = (covariance.diagonal() + 1e-4).sqrt()
        others = covariance - torch.diag(covariance.diagonal())
        return torch.relu(1 - deviation).mean(), others.square().sum() / z.shape[1]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        first, second = model(batch[0]), model(batch[1])
        (a, b), (c, d) = spread(first), spread(second)
        loss = 25 * F.mse_loss(first, second) + 12.5 * (a + c) + 0.5 * (b + d)
        return {"loss": loss, "embeddings": torch.cat([first, second])}

    t.forward = forward
    return t


class Bootstrapped(nn.Module):
    """A network, its running average, and a predictor of what the average says."""

    def __init__(self) -> None:
        super().__init__()
        self.online = projector(16)
        self.average = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, first, second):
        z = self.online(first), self.online(second)
        with torch.no_grad():
            wanted = self.average(second), self.average(first)
        return z, wanted, (self.predictor(z[0]), self.predictor(z[1]))


@healthy
def bootstrapped_views() -> Training:
    """Each view tells what a running average of the network says of the other. Grill et al. 2020, arXiv:2006.07733."""
    t = autoencoder.build(86)
    two_views(t, 86)
    t.model = Bootstrapped()
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=1e-3)
    t.schedule = lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 20))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        z, wanted, told = model(*batch)
        loss = sum(2 - 2 * F.cosine_similarity(a, b).mean() for a, b in zip(told, wanted, strict=True)) / 2
        return {"loss": loss, "embeddings": torch.cat(z)}

    def follow(training: Training, step: int) -> None:
        with torch.no_grad():
            model = training.model
            for mean, own in zip(model.average.parameters(), model.online.parameters(), strict=True):
                mean.lerp_(own, 0.03)

    t.forward = forward
    t.after_step.append(follow)
    return t
