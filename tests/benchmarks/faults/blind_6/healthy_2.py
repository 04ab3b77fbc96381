"""Runs with nothing wrong, of recommenders and of speaker verification, each seen to get better by a metric of its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from faults import recommender, tabular, verifier
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation, seeded

if TYPE_CHECKING:
    from torch.nn import Module

# -- recommenders ----------------------------------------------------------------------------------------------------


@healthy
def pairs_of_preference() -> Training:
    """The film that was watched against each of the others, by softplus of their difference; AdamW and a cosine. Rendle et al. 2009,
    arXiv:1205.2618."""
    t = recommender.build(201, activation=nn.GELU)
    t.model.head.bias = None
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 300)

    def forward(model: Module, batch: Batch) -> Tensors:
        logits = model(*batch)
        return {"loss": F.softplus(logits[:, 1:] - logits[:, :1]).mean(), "logits": logits}

    t.forward = forward
    return t


@healthy
def sampled_softmax_with_sparse_tables() -> Training:
    """Cross entropy over the list with a little smoothing; tables with sparse gradients and `SparseAdam`, Adam for all else."""
    t = recommender.build(205)
    t.model.head.bias = None
    tables = [t.model.user.embedding, t.model.item.embedding, t.model.popularity]
    for table in tables:
        table.sparse = True
    held = {id(table.weight) for table in tables}
    t.optimizers = [
        torch.optim.Adam((p for p in t.model.parameters() if id(p) not in held), 3e-3),
        torch.optim.SparseAdam([table.weight for table in tables], 2e-3),
    ]
    t.before.append(lambda training, step: training.optimizers[1].zero_grad())
    t.after_step.append(lambda training, step: training.optimizers[1].step())

    def forward(model: Module, batch: Batch) -> Tensors:
        logits = model(*batch)
        targets = torch.zeros(len(logits), dtype=torch.long)
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=0.02), "logits": logits, "targets": targets}

    t.forward = forward
    return t


class Factors(nn.Module):
    """A mean, a bias of each user and film, and a product of factors: the rating."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(recommender.USERS, 8), nn.Embedding(recommender.ITEMS, 8)
        self.user_bias, self.item_bias = nn.Embedding(recommender.USERS, 1), nn.Embedding(recommender.ITEMS, 1)
        self.mean = nn.Parameter(torch.tensor(3.5))
        for table, std in ((self.users, 0.3), (self.items, 0.3), (self.user_bias, 0.1), (self.item_bias, 0.1)):
            nn.init.normal_(table.weight, std=std)

    def forward(self, users, items):
        product = (self.users(users) * self.items(items)).sum(-1)
        return self.mean + product + (self.user_bias(users) + self.item_bias(items)).squeeze(-1)


@healthy
def factors_of_ratings() -> Training:
    """Matrix factorisation with biases of ratings from one to five, a squared error with a penalty on the rows of the batch, Adam.
    Koren et al. 2009."""
    t, made = recommender.build(203), seeded(601)
    tastes, films = torch.randn(recommender.USERS, 3, generator=made), torch.randn(recommender.ITEMS, 3, generator=made)
    torch.manual_seed(203)
    t.model = Factors()
    t.optimize = lambda p: torch.optim.Adam(p, 1e-2)

    def sample(step: int, phase: str) -> Batch:
        generator = seeded(602, step, len(phase))
        users = torch.randint(recommender.USERS, (256,), generator=generator)
        items = torch.randint(recommender.ITEMS, (256,), generator=generator)
        ratings = 3.6 + 0.5 * (tastes[users] * films[items]).sum(1) + 0.4 * films[items, 0]
        return users, items, (ratings + 0.3 * torch.randn(256, generator=generator)).clamp(1, 5)

    def forward(model: Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:2])
        penalty = model.users(batch[0]).square().mean() + model.items(batch[1]).square().mean()
        return {"loss": F.mse_loss(outputs, batch[2]) + 0.02 * penalty, "outputs": outputs, "targets": batch[2]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"rmse": float((tensors["outputs"] - batch[2]).square().mean().sqrt())}

    t.sample, t.forward, t.measure = sample, forward, measure
    return t


@healthy
def average_of_towers() -> Training:
    """Ids are dropped for one list in five, so that films without a history are learnt from their features, and an exponential average of
    the weights is what is validated."""
    t = recommender.build(204, activation=nn.SiLU, dropout=0.2)
    average = copy.deepcopy(t.model)
    for tower in (t.model.user, t.model.item):
        tower.embedding.register_forward_hook(
            lambda module, args, rows: (
                rows * (torch.rand(*rows.shape[:-1], 1) > 0.2).float() if module.training else rows
            )
        )

    def averaged(training: Training, step: int) -> None:
        with torch.no_grad():
            for mean, now in zip(average.parameters(), training.model.parameters(), strict=True):
                mean.lerp_(now, max(0.03, 1 / (step + 1)))

    def validate(training: Training, step: int, observer: Observer) -> None:
        model, training.model = training.model, average
        plain_validation(training, step, observer)
        training.model = model

    t.after_step.append(averaged)
    t.validate = validate
    return t


# -- speaker verification --------------------------------------------------------------------------------------------


@healthy
def plain_verifier() -> Training:
    """Dilated convolutions, statistics pooling, additive-margin softmax, SGD with momentum."""
    return verifier.build(1)


@healthy
def margin_that_grows() -> Training:
    """AdamW in one cycle; the margin grows from zero to 0.3 in the first hundred steps; bands and times are masked in training, as in
    SpecAugment. Wang et al. 2018, arXiv:1801.05599."""
    t = verifier.build(211)
    t.model.classifier.margin, plain = 0.0, t.sample
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 5e-3, total_steps=250)

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        if phase == "train":
            generator = seeded(611, step)
            band = torch.randint(0, 14, (len(features), 1, 1), generator=generator)
            time = torch.randint(0, 35, (len(features), 1, 1), generator=generator)
            bands, times = torch.arange(16)[None, None], torch.arange(40)[None, :, None]
            hidden = ((bands >= band) & (bands < band + 2)) | ((times >= time) & (times < time + 5))
            features = features.masked_fill(hidden, 0.0)
        return features, speakers

    def grown(training: Training, step: int) -> None:
        training.model.classifier.margin = 0.3 * min(1.0, step / 100)

    t.sample = sample
    t.before.append(grown)
    return t


class Prototypes(verifier.Verifier):
    """Two utterances of each speaker are a prototype, the third is compared with all of them, with a learned scale."""

    def __init__(self) -> None:
        super().__init__(activation=lambda: nn.LeakyReLU(0.1))
        del self.classifier
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, features, speakers=None):
        embeddings = self.embed(features)
        query, *others = F.normalize(embeddings.unflatten(0, (-1, 3)), dim=-1).unbind(1)
        return embeddings, self.scale * query @ F.normalize(sum(others), dim=-1).T


@healthy
def angular_prototypes() -> Training:
    """No classifier: each batch is 16 speakers with three utterances, and the loss an angular prototypical one; Adam. Chung et al. 2020,
    arXiv:2003.11982."""
    t = verifier.build(212)
    t.model, data = Prototypes(), {phase: verifier.utterances(2400, seeded(612, len(phase))) for phase in ("train", "val")}  # fmt: skip
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3)

    def sample(step: int, phase: str) -> Batch:
        generator = seeded(613, step, len(phase))
        features, speakers = data[phase]
        rows = []
        for speaker in torch.randperm(verifier.SPEAKERS, generator=generator)[:16]:
            own = (speakers == speaker).nonzero()[:, 0]
            rows.append(own[torch.randperm(len(own), generator=generator)[:3]])
        return features[torch.cat(rows)], speakers[torch.cat(rows)]

    def forward(model: Module, batch: Batch) -> Tensors:
        embeddings, logits = model(*batch)
        targets = torch.arange(len(logits))
        return {"loss": F.cross_entropy(logits, targets), "logits": logits, "targets": targets, "embeddings": embeddings}  # fmt: skip

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: {"eer": verifier.equal_error_rate(*verifier.trials(tensors["embeddings"], batch[1]))}  # fmt: skip
    return t


class AttentivePooling(nn.Module):
    """Mean and deviation under weights of each channel and frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.tanh = nn.Conv1d(channels, 16, 1), nn.Tanh()
        self.score, self.softmax = nn.Conv1d(16, channels, 1), nn.Softmax(2)

    def forward(self, x):
        weights = self.softmax(self.score(self.tanh(self.squeeze(x))))
        mean = (weights * x).sum(2)
        return torch.cat([mean, ((weights * x.square()).sum(2) - mean.square()).clamp(min=1e-4).sqrt()], 1)


@healthy
def attention_over_frames() -> Training:
    """Attentive statistics pooling, bfloat16, accumulation over two batches, clipping, and a warm-up. Okabe et al. 2018,
    arXiv:1803.10963."""
    t = verifier.build(213)
    t.model.pooling = AttentivePooling(2 * verifier.CHANNELS)
    t.precision, t.accumulate, t.clip, t.steps = torch.bfloat16, 2, 5.0, 150
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True, weight_decay=1e-4)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30) * 0.99**step)
    return t


@healthy
def new_speakers_on_old_layers() -> Training:
    """Fine-tuning: layers of a network that knows 24 speakers are frozen up to the second, BatchNorm as well, and a new classifier for
    others, whose bands are the other way round, is trained at ten times the rate of the rest."""
    t = verifier.build(214)
    t.prepare()
    for step in range(120):
        t.optimizer.zero_grad()
        t.forward(t.model, t.sample(step, "train"))["loss"].backward()
        t.optimizer.step()
    t.model.zero_grad()
    t.optimizers = []
    for layer in (t.model.frame1, t.model.frame2):
        layer.requires_grad_(False)
        layer.train = lambda mode=True, layer=layer: nn.Module.train(layer, False)
    t.model.classifier = verifier.MarginSoftmax(verifier.WIDTH, verifier.SPEAKERS)
    known = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = known(step, phase)
        return features.flip(2), speakers

    t.sample = sample
    rest = [p for name, p in t.model.named_parameters() if p.requires_grad and not name.startswith("classifier")]
    t.optimizers = [torch.optim.SGD([{"params": rest}, {"params": t.model.classifier.parameters(), "lr": 0.05}], 0.005, 0.9)]  # fmt: skip
    return t


# -- tables ----------------------------------------------------------------------------------------------------------


@healthy
def robust_prices() -> Training:
    """Huber's loss of prices, one in thirty of which is wrong by far; LayerNorm, Mish, RAdam, and a mild decay."""
    t = tabular.build(221, norm=nn.LayerNorm, activation=nn.Mish)
    t.optimize, plain = lambda p: torch.optim.RAdam(p, 5e-3, weight_decay=1e-5), t.sample

    def sample(step: int, phase: str) -> Batch:
        *given, price = plain(step, phase)
        wrong = torch.rand(len(price), generator=seeded(621, step, len(phase))) < 1 / 30
        return *given, torch.where(wrong, price + 4, price) if phase == "train" else price

    def forward(model: Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:2])
        return {"loss": F.huber_loss(outputs, batch[2], delta=0.5), "outputs": outputs, "targets": batch[2]}

    t.sample, t.forward = sample, forward
    return t
