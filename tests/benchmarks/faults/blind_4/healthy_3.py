"""Runs with nothing wrong: tables, fine-tuning, low rank, distillation, preferences, experts, locked towers, queues."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from faults import language, retrieval, tabular
from faults._fault import healthy
from faults._training import Batch, Tensors, Training, seeded
from faults.blind_4 import models_3 as models

# -- tables ----------------------------------------------------------------------------------------------------------


@healthy
def plain_tabular() -> Training:
    """Embeddings of columns, BatchNorm, dropout, Adam at one rate."""
    return tabular.build(1)


@healthy
def three_tiers() -> Training:
    """Cheap, usual and dear, 20 %, 60 % and 20 % of the rows; smoothed labels, SGD with Nesterov momentum, one cycle."""
    t = tabular.build(71)
    tabular.classified(t, -0.8, 0.8)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=301)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        return {"loss": F.cross_entropy(logits, batch[2], label_smoothing=0.1), "logits": logits, "targets": batch[2]}

    t.forward = forward
    return t


@healthy
def attention_over_columns() -> Training:
    """Each column is a token; two layers of a transformer, AdamW without decay of biases, warm-up and a linear decay."""
    t = tabular.build(72)
    t.model = models.Columns()

    def optimize(parameters) -> torch.optim.Optimizer:
        matrices, others = [], []
        for parameter in parameters:
            (matrices if parameter.ndim > 1 else others).append(parameter)
        return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], 3e-3)

    t.optimize, t.clip = optimize, 1.0
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min((step + 1) / 30, (301 - step) / 271))
    return t


@healthy
def claims_of_a_year() -> Training:
    """Counts of claims, two of three of them zero, by a Poisson loss with the logarithm of the exposure added; periodic
    embeddings of numbers, SiLU."""
    t = tabular.build(73, activation=nn.SiLU)
    t.model.numbers, plain = models.Periods(), t.sample
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.01)

    def sample(step: int, phase: str) -> Batch:
        numbers, categories, price = plain(step, phase)
        days = torch.randint(90, 366, (len(price),), generator=seeded(73, step, len(phase)))
        counts = torch.poisson(days / 365 * (price - 0.6).exp(), seeded(74, step, len(phase)))
        return numbers, categories, counts, (days / 365).log()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:2]) + batch[3]
        return {"loss": F.poisson_nll_loss(outputs, batch[2]), "outputs": outputs, "targets": batch[2]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        usual = F.poisson_nll_loss((batch[2].sum() / batch[3].exp().sum()).log() + batch[3], batch[2])
        return {"nats_below_usual": float(usual - tensors["loss"])}

    t.sample, t.forward, t.measure = sample, forward, measure
    return t


@healthy
def price_and_sale() -> Training:
    """Two tasks with learnt uncertainties, so that the loss becomes negative; LeakyReLU, no dropout, a cosine."""
    t = tabular.build(75)
    t.model, plain = models.Tasks(), t.sample
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 300)

    def sample(step: int, phase: str) -> Batch:
        numbers, categories, price = plain(step, phase)
        return numbers, categories, price, (numbers[:, 4] + categories[:, 2] - 1.5 > price).float()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        price, sold = model(*batch[:2]).unbind(1)
        terms = torch.stack([F.mse_loss(price, batch[2]), F.binary_cross_entropy_with_logits(sold, batch[3])])
        loss = ((-model.uncertainty).exp() * terms + model.uncertainty / 2).sum()
        return {"loss": loss, "outputs": price, "targets": batch[2], "sold": sold}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right = ((tensors["sold"] > 0) == (batch[3] > 0)).float().mean()
        return {**tabular.measure(tensors, batch), "accuracy": float(right)}

    t.sample, t.forward, t.measure = sample, forward, measure
    return t


# -- language --------------------------------------------------------------------------------------------------------


def renamed(t: Training, by: int) -> None:
    """From now on another text: each token is called by the name of one `by` places on."""
    plain = t.sample
    t.sample = lambda step, phase: tuple((part + by) % language.TOKENS for part in plain(step, phase))


@healthy
def low_rank_for_another_text() -> Training:
    """A model trained for one text learns another by differences of rank four and by its norms; all else is frozen."""
    t = language.build(76)
    models.trained(t, 200)
    renamed(t, 3)
    for name, parameter in t.model.named_parameters():
        parameter.requires_grad_("norm" in name)
    for block in t.model.blocks:
        block.attention.qkv, block.attention.out = (
            models.LowRank(block.attention.qkv),
            models.LowRank(block.attention.out),
        )
        block.mlp[0], block.mlp[2] = models.LowRank(block.mlp[0]), models.LowRank(block.mlp[2])
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.0)
    return t


@healthy
def student_of_one_block() -> Training:
    """Half a divergence from a teacher at a temperature of 2, half the targets; the teacher lies outside of the model."""
    t = language.build(77)
    models.trained(t, 250)
    teacher = copy.deepcopy(t.model).eval().requires_grad_(False)
    t.model = language.Language(dropout=0.05)
    t.model.blocks = t.model.blocks[:1]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        with torch.no_grad():
            soft = (teacher(batch[0]) / 2).log_softmax(-1)
        near = F.kl_div((logits / 2).log_softmax(-1), soft, log_target=True, reduction="none").sum(-1).mean()
        hard = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        return {"loss": 0.5 * hard + 2 * near, "logits": logits, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def two_of_four_experts() -> Training:
    """A mixture of experts in each block with a small term for their balance; not every expert sees every batch alike."""
    t = language.build(78)
    for block in t.model.blocks:
        block.mlp = models.Experts()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = language.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] + 0.02 * sum(block.mlp.balance for block in model.blocks)}

    t.forward, t.steps = forward, 250
    return t


@healthy
def preferred_answers() -> Training:
    """Direct preference optimisation against a frozen copy: of 16 sentences those eight are preferred that have more tokens above
    9. Rafailov et al. 2023, arXiv:2305.18290."""
    t = language.build(79)
    models.trained(t, 200)
    reference, plain = copy.deepcopy(t.model).eval().requires_grad_(False), t.sample
    t.optimize, t.schedule = (lambda p: torch.optim.AdamW(p, 2e-4, weight_decay=0.0)), None

    def sample(step: int, phase: str) -> Batch:
        tokens, targets = plain(step, phase)
        wins = (targets > 9).float().mean(1).argsort(descending=True)
        half = len(wins) // 2
        return tokens[wins], targets[wins], torch.arange(len(wins)) < half

    def chances(model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch[0]).log_softmax(-1).gather(-1, batch[1][..., None])[..., 0].sum(1)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        with torch.no_grad():
            before = chances(reference, batch)
        gained = chances(model, batch) - before
        won, lost = gained[batch[2]], gained[~batch[2]]
        return {"loss": -F.logsigmoid(0.1 * (won - lost)).mean(), "won": won.detach(), "lost": lost.detach()}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        margin = tensors["won"] - tensors["lost"]
        return {"reward_accuracy": float((margin > 0).float().mean()), "margin": float(margin.mean())}

    t.sample, t.forward, t.measure = sample, forward, measure
    return t


# -- retrieval -------------------------------------------------------------------------------------------------------


@healthy
def locked_audio_tower() -> Training:
    """A trained audio tower is frozen and stays in eval mode; a text tower is trained for it from the start. Zhai et al. 2021,
    arXiv:2111.07991."""
    t = retrieval.build(81)
    models.trained(t, 150)
    t.model.text = retrieval.TextTower(0.1)
    t.model.audio.requires_grad_(False)

    def lock(mode: bool = True) -> nn.Module:
        return nn.Module.train(t.model.audio, False)

    t.model.audio.train = lock
    return t


@healthy
def queue_of_negatives() -> Training:
    """A slow text tower and a queue of its last 256 captions, so that a loss over 288 captions goes beside that of the batch. He
    et al. 2019, arXiv:1911.05722."""
    t = retrieval.build(82)
    t.model = models.Queued()
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=0.01)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, longer, kept = model(*batch)
        if model.training:
            model.follow(kept)
        targets = torch.arange(len(logits))
        loss = (F.cross_entropy(logits.T, targets) + F.cross_entropy(longer, targets)) / 2
        return {"loss": loss, "logits": logits, "targets": targets}

    t.forward = forward
    return t
