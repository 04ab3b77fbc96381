"""Runs with nothing wrong: what people train today, each seen to get better by a metric of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from faults import (
    autoencoder,
    classifier,
    enhancement,
    forecaster,
    language,
    recogniser,
    retrieval,
    separation,
)
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, seeded, update_of_two
from faults.blind_2 import models

# -- pictures --------------------------------------------------------------------------------------------------------


@healthy
def each_class_by_itself() -> Training:
    """One against all others: a binary cross entropy of scores for each class, most of whose targets are zero."""
    t = classifier.build(61)
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(batch[1], classifier.CLASSES).float())
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def residuals_that_start_at_zero() -> Training:
    """Residual blocks whose last gain starts at zero, so that each is the identity at first; SGD, momentum, a cosine."""
    t = classifier.build(62)
    t.model.block2 = nn.Sequential(t.model.block2, models.Residual(16))
    t.model.block3 = nn.Sequential(t.model.block3, models.Residual(16))
    t.optimize = lambda p: torch.optim.SGD(p, 0.03, momentum=0.9, weight_decay=1e-4)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 300)
    return t


@healthy
def sharpness_aware() -> Training:
    """Two passes a step, the second one at the worst point nearby; weights go there and come back. Foret et al. 2020,
    arXiv:2010.01412."""
    t = classifier.build(63)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        weights = list(training.model.parameters())
        batch = training.sample(step, "train")
        training.optimizer.zero_grad()
        training.forward(training.model, batch)["loss"].backward()
        norm = torch.stack([p.grad.norm() for p in weights]).norm() + 1e-12
        offsets = [0.05 * p.grad / norm for p in weights]
        with torch.no_grad():
            for weight, offset in zip(weights, offsets, strict=True):
                weight.add_(offset)
        training.optimizer.zero_grad()
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        with torch.no_grad():
            for weight, offset in zip(weights, offsets, strict=True):
                weight.sub_(offset)
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update
    return t


@healthy
def mean_teacher() -> Training:
    """Half of each batch has no label and follows a running average of the model, which is a frozen part of it."""
    t = classifier.build(64)
    t.model = models.WithTeacher()
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        x, y = batch
        logits = model(x)
        with torch.no_grad():
            wanted = model.teacher(x + 0.1 * torch.randn(x.shape, generator=seeded(64, int(y.sum()))))
        half = len(y) // 2
        loss = F.cross_entropy(logits[:half], y[:half]) + 0.3 * F.mse_loss(logits.softmax(1), wanted.softmax(1))
        return {"loss": loss, "logits": logits, "targets": y}

    def follow(training: Training, step: int) -> None:
        with torch.no_grad():
            own = dict(training.model.named_parameters())
            for name, parameter in training.model.teacher.named_parameters():
                parameter.lerp_(own[name], 0.02)

    t.forward = forward
    t.after_step.append(follow)
    return t


# -- plain networks --------------------------------------------------------------------------------------------------


@healthy
def hidden_columns() -> Training:
    """A third of the columns is set to zero on the way in, and all are told. Vincent et al. 2008."""
    t = autoencoder.build(61, activation=nn.SiLU)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        kept = torch.rand(x.shape, generator=seeded(61, step, len(phase))) > 1 / 3
        return x * kept, x

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: {"explained": 1 - float(tensors["loss"] / batch[1].var())}
    return t


@healthy
def sixteen_codes() -> Training:
    """A code of one of 16 directions, with a straight-through gradient and a commitment; codes come in use one by one."""
    t = autoencoder.build(62)
    t.model = models.Coded()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, distance = model(batch[0])
        return {"loss": F.mse_loss(outputs, batch[0]) + distance, "outputs": outputs, "targets": batch[0]}

    t.forward, t.steps = forward, 400
    return t


@healthy
def self_normalising() -> Training:
    """SELU with LeCun's initialisation, alpha dropout, and SGD with momentum. Klambauer et al. 2017, arXiv:1706.02515."""
    t = autoencoder.build(63, activation=lambda: nn.Sequential(nn.SELU(), nn.AlphaDropout(0.02)))
    for module in t.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)
    return t


# -- language --------------------------------------------------------------------------------------------------------


@healthy
def branches_times_zero_at_first() -> Training:
    """No normalisation within blocks; each branch is multiplied by a factor that starts at zero and is learnt."""
    t = language.build(61)
    t.model.blocks = nn.ModuleList(models.ReZero() for _ in range(4))
    return t


@healthy
def words_hidden() -> Training:
    """One token in seven is hidden and told from both sides; the others have no target."""
    t = language.build(62)
    t.model, plain = models.Masked(), t.sample
    t.steps, t.accumulate = 400, 2
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: language.warm_up_and_cosine(optimizer, 400)

    def sample(step: int, phase: str) -> Batch:
        tokens, _ = plain(step, phase)
        hidden = torch.rand(tokens.shape, generator=seeded(62, step, len(phase))) < 0.15
        return tokens.masked_fill(hidden, language.TOKENS), tokens.masked_fill(~hidden, -100)

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        asked = batch[1] >= 0
        return {"accuracy": float((tensors["logits"].argmax(-1) == batch[1])[asked].float().mean())}

    t.sample, t.measure = sample, measure
    return t


@healthy
def normalised_behind_the_sum() -> Training:
    """Post-norm blocks, Adam with a second beta of 0.98, and a rate that rises for 60 steps and falls with their root."""
    t = language.build(63)
    t.model.blocks = nn.ModuleList(models.PostNorm(block) for block in t.model.blocks)
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3, betas=(0.9, 0.98), eps=1e-9)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min((step + 1) / 60, (60 / (step + 1)) ** 0.5))
    return t


@healthy
def orthogonal_steps() -> Training:
    """Muon for the matrices within blocks, AdamW for tables, norms and biases: two optimizers that share no weight."""
    t = language.build(64)
    inside = [p for p in t.model.blocks.parameters() if p.ndim == 2]
    others = [p for p in t.model.parameters() if all(p is not q for q in inside)]
    t.optimizers = [torch.optim.Muon(inside, 0.01), torch.optim.AdamW(others, 3e-3, weight_decay=0.01)]

    t.update = update_of_two
    return t


# -- speech ----------------------------------------------------------------------------------------------------------


@healthy
def good_enough_counts_no_more() -> Training:
    """The loss of an item ends at 12 dB, so that easy ones do not rule the batch; AdamW and a long decay."""
    t = separation.build(61)
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 0.997**step)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        straight = separation.si_sdr(estimates, batch[1]).mean(1)
        crossed = separation.si_sdr(estimates, batch[1].flip(1)).mean(1)
        loss = -torch.maximum(straight, crossed).clamp(max=12.0).mean()
        return separation.shown(loss, estimates, batch)

    t.forward, t.steps = forward, 400
    return t


@healthy
def bands_masked() -> Training:
    """SpecAugment: in training one band of features and a stretch of frames are zero. Park et al. 2019, arXiv:1904.08779."""
    t = recogniser.build(62)
    plain, t.steps = t.sample, 400

    def sample(step: int, phase: str) -> Batch:
        x, *rest = plain(step, phase)
        if phase == "train":
            x = x.clone()
            for i, (band, frame) in enumerate(torch.rand(len(x), 2, generator=seeded(62, step)).tolist()):
                x[i, :, int(band * 8) : int(band * 8) + 2] = 0.0
                x[i, int(frame * 40) : int(frame * 40) + 4] = 0.0
        return x, *rest

    t.sample = sample
    return t


@healthy
def attentive_recogniser() -> Training:
    """A transformer layer in place of the recurrence, dropout, warm-up and a linear decay."""
    t = recogniser.build(63)
    t.model, t.steps = models.Attentive(), 400
    t.optimize = lambda p: torch.optim.AdamW(p, 4e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min((step + 1) / 40, (400 - step) / 360))
    return t


@healthy
def gates_and_two_terms() -> Training:
    """Gated linear units, no normalisation, and a loss of compressed and of linear magnitudes."""
    t = enhancement.build(61)
    t.model.layer2, t.model.layer3 = models.Gate(), models.Gate()
    t.optimize, t.clip = (lambda p: torch.optim.NAdam(p, 2e-3)), 5.0

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = enhancement.compressed(outputs, batch[1]) + 0.3 * F.l1_loss(outputs, batch[1])
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.forward = forward
    return t


# -- series and pairs ------------------------------------------------------------------------------------------------


@healthy
def mean_and_deviation() -> Training:
    """A Gaussian likelihood with a learnt deviation: the loss passes zero, its gradients grow as the deviation falls."""
    t = forecaster.build(61)
    t.model = models.Gaussian()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, deviation = model(batch[0])
        loss = F.gaussian_nll_loss(outputs, batch[1], deviation.square())
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def patches_of_hours() -> Training:
    """A post-norm transformer over patches, dropout, a Huber loss, AdamW and a proper cut of the rate on plateaus."""
    t = forecaster.build(62)
    t.model = models.Patches()
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.01)
    cuts: list[ReduceLROnPlateau] = []

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.huber_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if not cuts:
            cuts.append(ReduceLROnPlateau(training.optimizer, factor=0.5, patience=40))
        batch, tensors = plain_update(training, step, observer)
        cuts[0].step(float(tensors["loss"].detach()))
        return batch, tensors

    t.forward, t.update = forward, update
    return t


@healthy
def series_of_many_sizes() -> Training:
    """Series in their own units, from one to ten thousand; the model standardises each window and scales its answer back,
    the loss is relative to the size."""
    t = forecaster.build(63)
    t.model, plain = models.Reversible(), t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        size = 10 ** (4 * torch.rand(len(x), 1, generator=seeded(63, step, len(phase))))
        return torch.cat([(x[..., :1] + 5) * size[..., None], x[..., 1:]], -1), (y + 5) * size

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        size = batch[0][..., 0].mean(1, keepdim=True)
        return {"loss": 25 * ((outputs - batch[1]) / size).square().mean(), "outputs": outputs, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        size = batch[0][..., 0].mean(1, keepdim=True)
        naive = ((batch[0][:, -1:, 0] - batch[1]) / size).abs().mean()
        return {"skill": float(1 - ((tensors["outputs"] - batch[1]) / size).abs().mean() / naive)}

    t.sample, t.forward, t.measure = sample, forward, measure
    return t


@healthy
def pairs_one_by_one() -> Training:
    """A sigmoid for each pair of clip and caption, with a bias of -10 at the start. Zhai et al. 2023, arXiv:2303.15343."""
    t = retrieval.build(61)
    t.model.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch) + model.bias
        signs = 2 * torch.eye(len(logits)) - 1
        return {
            "loss": -F.logsigmoid(signs * logits).sum(1).mean(),
            "logits": logits,
            "targets": torch.arange(len(logits)),
        }

    t.forward = forward
    return t


@healthy
def hardest_negatives() -> Training:
    """A triplet loss against the hardest negative of the batch: zero for whoever is right by the margin. Faghri et al. 2017,
    arXiv:1707.05612."""
    t = retrieval.build(62)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        cosines = model(*batch) / model.scale.exp().detach()
        own, others = cosines.diagonal(), cosines - 2 * torch.eye(len(cosines))
        loss = sum(torch.relu(0.2 - own + others.amax(axis)).mean() for axis in (0, 1))
        return {"loss": loss, "logits": cosines, "targets": torch.arange(len(cosines))}

    t.model.scale.requires_grad_(False)
    t.forward = forward
    return t
