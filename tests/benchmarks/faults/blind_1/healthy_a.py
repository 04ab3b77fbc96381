"""Runs with nothing wrong: losses, schedules and architectures that people train every day, each seen to get better."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.rnn import pack_padded_sequence

from faults import classifier, forecaster, language, recogniser
from faults._fault import healthy
from faults._training import Batch, Tensors, Training, seeded

# -- losses ----------------------------------------------------------------------------------------------------------


@healthy
def plain_forecaster() -> Training:
    """Adam, an LSTM, a squared error."""
    return forecaster.build(1)


@healthy
def quantiles_of_heavy_tails() -> Training:
    """Three quantiles by the pinball loss; one value in fifty is far off, in inputs and targets, as in sales."""
    t = forecaster.build(2)
    t.model.head = nn.Linear(t.model.head.in_features, 3 * forecaster.HORIZON)
    levels, plain = torch.tensor([0.1, 0.5, 0.9]), t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        made = seeded(12, step, len(phase))
        far = lambda shape: (torch.rand(shape, generator=made) < 0.02) * 4 * torch.randn(shape, generator=made)  # noqa: E731
        return torch.cat([x[..., :1] + far((*x.shape[:2], 1)), x[..., 1:]], -1), y + far(y.shape)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        quantiles = model(batch[0]).unflatten(-1, (3, -1))
        error = batch[1][:, None] - quantiles
        loss = torch.maximum(levels[:, None] * error, (levels[:, None] - 1) * error).mean()
        return {"loss": loss, "outputs": quantiles[:, 1], "targets": batch[1]}

    t.sample, t.forward = sample, forward
    return t


@healthy
def mixed_pictures() -> Training:
    """Mixup of two pictures and their labels, label smoothing, AdamW, warm-up and cosine: the training loss stays far above
    that of validation."""
    t = classifier.build(21, dropout=0.1)
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.05)
    t.schedule = language.warm_up_and_cosine
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "val":
            return x, y, y, torch.tensor(1.0)
        share = 1 - 0.5 * torch.rand((), generator=seeded(4, step)).square()
        return share * x + (1 - share) * x.flip(0), y, y.flip(0), share

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        x, y, other, share = batch
        logits = model(x)
        both = [F.cross_entropy(logits, labels, label_smoothing=0.1) for labels in (y, other)]
        return {"loss": share * both[0] + (1 - share) * both[1], "logits": logits, "targets": y}

    t.sample, t.forward = sample, forward
    return t


@healthy
def rare_class_weighted() -> Training:
    """One class is ten times rarer than the others, in training and in validation, and weighs ten times as much: it is
    recognised."""
    t = classifier.build(22)
    rare = lambda n, seed: torch.where(torch.rand(n, generator=seeded(seed)) < 0.025, 4, torch.arange(n) % 4)  # noqa: E731
    data = {
        "train": classifier.pictures(4000, 22, rare(4000, 5)),
        "val": classifier.pictures(400, 1022, rare(400, 6)),
    }
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0])

    def sample(step: int, phase: str) -> Batch:
        x, y = data[phase]
        chosen = torch.randint(len(x), (64,), generator=seeded(22, step, len(phase)))
        return x[chosen], y[chosen]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], weight), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    return t


@healthy
def distilled_student() -> Training:
    """A student of half the width and a trained teacher: soft targets at a temperature of 3, and labels."""
    teacher = trained(classifier.build(23), 200)
    t = classifier.build(23)
    t.model.block2 = classifier.block(8, 8, 2, nn.BatchNorm2d, nn.ReLU)
    t.model.block3 = classifier.block(8, 8, 2, nn.BatchNorm2d, nn.ReLU)
    t.model.head = nn.Linear(8 * 9, classifier.CLASSES)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        with torch.no_grad():
            soft = (teacher(batch[0]) / 3).softmax(1)
        loss = 9 * F.kl_div((logits / 3).log_softmax(1), soft, reduction="batchmean")
        return {"loss": 0.9 * loss + 0.1 * F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.forward = forward
    return t


def trained(t: Training, steps: int) -> nn.Module:
    """The model after some steps of its own program, in eval mode and frozen."""
    optimizer = torch.optim.Adam(t.model.parameters(), 3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        t.forward(t.model, t.sample(step, "train"))["loss"].backward()
        optimizer.step()
    return t.model.eval().requires_grad_(False)


# -- without labels --------------------------------------------------------------------------------------------------


class Embedder(nn.Module):
    """Embeddings of pictures, and a predictor of one view's embedding from that of another."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = classifier.Classifier()
        self.features.head = nn.Linear(16 * 9, width)
        self.projector = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width, affine=False))  # fmt: skip
        self.predictor = nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, width))

    def forward(self, x):
        z = self.projector(self.features(x))
        return z, self.predictor(z)


def views(t: Training) -> None:
    """Give two noisy views of each picture, one above the other; measure how many find their twin among the others."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        made = seeded(6, step, len(phase))
        both = [x + 0.3 * torch.randn(x.shape, generator=made) for _ in range(2)]
        return torch.cat(both), y

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        first, second = F.normalize(tensors["embeddings"], dim=1).chunk(2)
        hit = (first @ second.T).argmax(1) == torch.arange(len(first))
        return {"twins": float(hit.float().mean()), "spread": float(tensors["embeddings"].std(0).mean())}

    t.sample, t.measure = sample, measure


@healthy
def siamese_with_stop_gradient() -> Training:
    """Two views that predict one another, one side detached: a loss between 0 and -1. Chen and He 2021, arXiv:2011.10566."""
    t = classifier.build(24)
    views(t)
    t.model = Embedder()
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-4)
    t.schedule = language.warm_up_and_cosine

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        z, p = model(batch[0])
        other = z.detach().roll(len(z) // 2, 0)
        return {"loss": -F.cosine_similarity(p, other).mean(), "embeddings": z}

    t.forward = forward
    return t


@healthy
def contrasted_views() -> Training:
    """Two views of each picture against all others, at a temperature of 0.2. Chen et al. 2020, arXiv:2002.05709."""
    t = classifier.build(25)
    views(t)
    t.model = Embedder()
    t.model.predictor = nn.Identity()
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        embeddings = model(batch[0])[1]
        unit = F.normalize(embeddings, dim=1)
        scores = (unit @ unit.T / 0.2).masked_fill(torch.eye(len(unit), dtype=torch.bool), -1e9)
        twins = torch.arange(len(unit)).roll(len(unit) // 2)
        return {"loss": F.cross_entropy(scores, twins), "embeddings": embeddings}

    t.forward = forward
    return t


@healthy
def values_with_a_target_network() -> Training:
    """Q-learning of a walk along a corridor: the target is the model itself of 25 steps before, so the loss rises while the
    values grow, and the policy gets better."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    places, wave = torch.arange(8), torch.randn(8, 8, generator=seeded(31))
    target = copy.deepcopy(model)

    def sample(step: int, phase: str) -> Batch:
        made = seeded(31, step, len(phase))
        here = torch.randint(8, (64,), generator=made)
        action = torch.randint(2, (64,), generator=made)
        noise = 0.1 * torch.randn(2, 64, 8, generator=made)
        there = (here + 2 * action - 1).clamp(0, 7)
        return wave[here] + noise[0], action, (there == 7).float(), wave[there] + noise[1]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        x, action, reward, after = batch
        with torch.no_grad():
            goal = reward + 0.9 * (1 - reward) * target(after).max(1).values
        value = model(x).gather(1, action[:, None])[:, 0]
        return {"loss": F.smooth_l1_loss(value, goal), "outputs": value, "targets": goal}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        with torch.no_grad():
            values = model(wave)
        return {"right_turns": float((values.argmax(1)[places < 7] == 1).float().mean()), "value": float(values.mean())}

    def follow(training: Training, step: int) -> None:
        if step % 25 == 24:
            target.load_state_dict(training.model.state_dict())

    return Training(model, sample, forward, measure, lambda p: torch.optim.Adam(p, 1e-3), after_step=[follow])


# -- how it is trained -----------------------------------------------------------------------------------------------


@healthy
def carried_on_after_convergence() -> Training:
    """A recogniser that has learnt everything goes on at a low rate: nothing to gain, nothing lost."""
    t = recogniser.build(26)
    t.model = trained(recogniser.build(26), 250).train().requires_grad_(True)
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-4)
    return t


@healthy
def thawed_in_stages() -> Training:
    """Only the head at first, then block by block from behind, on features that were trained for other data."""
    t = classifier.build(28)
    t.model.load_state_dict(trained(classifier.build(29), 40).state_dict())
    t.model.head.reset_parameters()
    stages = {0: t.model.head, 60: t.model.block3, 120: t.model.block2, 180: t.model.block1}
    t.optimizers = [torch.optim.AdamW(t.model.parameters(), 1e-3)]

    def thaw(training: Training, step: int) -> None:
        if step == 0:
            training.model.requires_grad_(False)
        if step in stages:
            stages[step].requires_grad_(True)

    t.before.append(thaw)
    return t


@healthy
def micro_batches_of_two() -> Training:
    """Batches of two, sixteen of them to a step, each divided by sixteen; GroupNorm."""
    t = classifier.build(30, norm=lambda channels: nn.GroupNorm(4, channels))
    plain = t.sample
    t.sample = lambda step, phase: tuple(p[:2] for p in plain(step, phase)) if phase == "train" else plain(step, phase)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)
    t.accumulate, t.steps, t.clip = 16, 150, 1.0
    return t


# -- what is trained -------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A GRU over pasts of different lengths, without their padding."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(forecaster.FEATURES, width, num_layers=2, dropout=0.1)
        self.head = nn.Linear(width, forecaster.HORIZON)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x.transpose(0, 1), lengths, enforce_sorted=False)
        return self.head(self.gru(packed)[1][-1])


@healthy
def packed_pasts() -> Training:
    """Pasts of 12 to 36 hours, padded with zeros and packed; a GRU of two layers with dropout."""
    t = forecaster.build(32)
    t.model, plain = Packed(), t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        lengths = torch.randint(12, forecaster.PAST + 1, (len(x),), generator=seeded(32, step, len(phase)))
        kept = torch.arange(forecaster.PAST) < lengths[:, None]
        moved = torch.stack([row.roll(int(n), 0) for row, n in zip(x, lengths, strict=True)])
        return moved * kept[..., None], y, lengths

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0], batch[2])
        return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: {"mae": float((tensors["outputs"] - batch[1]).abs().mean())}
    return t


@healthy
def spectral_norms() -> Training:
    """Each convolution is divided by its largest singular value; no other normalisation, and LeakyReLU."""
    t = classifier.build(33, norm=lambda channels: nn.Identity(), activation=lambda: nn.LeakyReLU(0.2))
    for block in (t.model.block1, t.model.block2, t.model.block3):
        spectral_norm(block.conv)
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3)
    return t


class Skipped(nn.Module):
    """A residual block that is left out by chance."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return x if self.training and torch.rand(()) < 0.25 else self.block(x)


@healthy
def skipped_blocks() -> Training:
    """Stochastic depth: each block of the transformer is left out in one batch of four. Huang et al. 2016, arXiv:1603.09382."""
    t = language.build(34)

    t.model.blocks = nn.ModuleList(Skipped(block) for block in t.model.blocks)
    return t


@healthy
def padded_vocabulary() -> Training:
    """A table of 64 tokens, as suits the hardware, for a tokeniser that has 20; padding is not scored."""
    t = language.build(35)
    t.model.embedding = nn.Embedding(64, language.WIDTH)
    nn.init.normal_(t.model.embedding.weight, std=0.1)
    t.model.head = nn.Linear(language.WIDTH, 64, bias=False)
    t.model.head.weight = t.model.embedding.weight
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        tokens, targets = plain(step, phase)
        lengths = torch.randint(8, language.TIME + 1, (len(tokens), 1), generator=seeded(35, step, len(phase)))
        kept = torch.arange(language.TIME) < lengths
        return tokens.where(kept, torch.tensor(63)), targets.where(kept, torch.tensor(-100))

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        kept = batch[1] >= 0
        return {"accuracy": float((tensors["logits"].argmax(-1) == batch[1])[kept].float().mean())}

    t.sample, t.measure = sample, measure
    return t
