"""Runs with nothing wrong, of what people train with molecules and sentences, each seen to get better by a metric of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR

from faults import language, molecules, tagger, translator
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation


def trained(t: Training, steps: int) -> nn.Module:
    """The model behind so many steps."""
    optimizer = t.optimize(t.model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        t.forward(t.model, t.sample(step, "train"))["loss"].backward()
        optimizer.step()
    return t.model


# -- molecules -------------------------------------------------------------------------------------------------------


@healthy
def plain_molecules() -> Training:
    """Message passing with BatchNorm, a gated sum, the squared error, Adam with a rate that falls in steps."""
    return molecules.build(1)


@healthy
def absolute_error_and_layer_norm() -> Training:
    """LayerNorm, SiLU, four layers, dropout, a smooth absolute error, AdamW, a cosine, clipping."""
    t = molecules.build(2, norm=nn.LayerNorm, activation=nn.SiLU, layers=4, dropout=0.05)
    t.optimize, t.clip = (lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.01)), 2.0
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 250)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:5], len(batch[5]))
        return {"loss": F.smooth_l1_loss(outputs, batch[5], beta=0.5), "outputs": outputs, "targets": batch[5]}

    t.forward = forward
    return t


@healthy
def active_or_not() -> Training:
    """A classifier: is the property in its upper fifth? Weighted for the rare class, one cycle of rates, the area under the curve."""
    t = molecules.build(3)
    t.steps, t.optimize = 200, lambda p: torch.optim.AdamW(p, 4e-4, weight_decay=0.01)
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 4e-3, total_steps=201)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, active = model(*batch[:5], len(batch[5])), (batch[5] > 0.8).float()
        loss = F.binary_cross_entropy_with_logits(logits, active, pos_weight=torch.tensor(3.0))
        return {"loss": loss, "logits": logits, "targets": active}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        active = tensors["targets"] > 0
        ahead = tensors["logits"][active][:, None] > tensors["logits"][~active]
        return {"auroc": float(ahead.float().mean())}

    t.forward, t.measure = forward, measure
    return t


@healthy
def validated_by_an_average() -> Training:
    """SGD with Nesterov's momentum; a running average of the weights is what is validated."""
    t = molecules.build(4)
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
    average = torch.optim.swa_utils.AveragedModel(t.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=True)  # fmt: skip
    t.clip, t.schedule = 5.0, lambda optimizer: ExponentialLR(optimizer, 0.99)
    t.after_step.append(lambda training, step: average.update_parameters(training.model))

    def validate(training: Training, step: int, observer: Observer) -> None:
        trained, training.model = training.model, average.module
        plain_validation(training, step, observer)
        training.model = trained

    t.validate = validate
    return t


@healthy
def another_property() -> Training:
    """Fine-tuning: layers that were trained for one property stay frozen, BatchNorm with them, and a new readout and head learn the
    number of rare atoms."""
    t = molecules.build(6)
    t.model = trained(molecules.build(5), 150)
    t.model.readout = molecules.Readout()
    t.model.head = nn.Sequential(nn.Linear(molecules.WIDTH, molecules.WIDTH), nn.ReLU(), nn.Linear(molecules.WIDTH, 1))
    for part in (t.model.kinds, t.model.numbers, t.model.layers):
        part.requires_grad_(False)
    t.model.layers.eval()
    t.model.layers.train = lambda mode=True: t.model.layers
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        numbers, kinds, edges, bonds, graph, values = plain(step, phase)
        rare = torch.zeros(len(values)).index_add(0, graph, (kinds == 5).float() * numbers[:, 1].abs())
        return numbers, kinds, edges, bonds, graph, (rare - 1.3) / 1.2

    t.sample, t.steps = sample, 200
    return t


# -- taggers ---------------------------------------------------------------------------------------------------------


@healthy
def plain_tagger() -> Training:
    """A bidirectional LSTM over packed sentences, Adam, clipping; one tag in four is rare."""
    return tagger.build(1)


@healthy
def gated_tagger() -> Training:
    """GRU cells in two layers, GELU, label smoothing, AdamW, a cosine, batches accumulated by two."""
    t = tagger.build(2, cell=nn.GRU, layers=2, activation=nn.GELU)
    t.optimize = lambda p: torch.optim.AdamW(p, 8e-3, weight_decay=0.01)
    t.schedule, t.accumulate, t.steps = (lambda optimizer: CosineAnnealingLR(optimizer, 150)), 2, 150

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten(), label_smoothing=0.05)
        return {"loss": loss, "logits": logits, "targets": batch[2]}

    t.forward = forward
    return t


@healthy
def weights_for_rare_tags() -> Training:
    """Rare tags weigh three times as much, words are dropped to unknown in training, RMSprop, a rate that falls."""
    t = tagger.build(3, dropout=0.2)
    t.optimize, t.schedule = (lambda p: torch.optim.RMSprop(p, 3e-3)), lambda optimizer: ExponentialLR(optimizer, 0.993)
    weights = torch.tensor([1.0, 3.0, 3.0, 3.0])

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        words, shapes, tags = batch
        if model.training:
            words = words.where((torch.rand(words.shape) > 0.03) | (words == tagger.PAD), tagger.WORDS - 41)
        logits = model(words, shapes)
        loss = F.cross_entropy(logits.flatten(0, 1), tags.flatten(), weight=weights)
        return {"loss": loss, "logits": logits, "targets": tags}

    t.forward = forward
    return t


@healthy
def word_vectors_kept() -> Training:
    """Word vectors of an earlier tagger stay frozen, the rest is new, SGD with momentum and clipping."""
    before, t = trained(tagger.build(4), 150), tagger.build(5)
    t.model.words = before.words.requires_grad_(False)
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.5, momentum=0.9)), 1.0
    return t


# -- others ----------------------------------------------------------------------------------------------------------


@healthy
def partition_kept_small() -> Training:
    """A language model with dropout, a small penalty of the log partition, a rate that is constant and then falls, bfloat16."""
    t = language.build(91, dropout=0.05)
    t.precision = torch.bfloat16
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20, (310 - step) / 60))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0]).float()
        penalty = logits.logsumexp(-1).square().mean()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()) + 1e-4 * penalty
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward
    return t


@healthy
def one_table_for_all() -> Training:
    """A translator with one table for both languages and the head, GELU, label smoothing, batches accumulated by two."""
    t = translator.build(92, activation=nn.GELU)
    t.model.target.table.weight = t.model.source.table.weight
    t.model.head = nn.Linear(translator.WIDTH, translator.WORDS, bias=False)
    t.model.head.weight = t.model.source.table.weight
    t.accumulate, t.steps = 2, 200

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten(), label_smoothing=0.1)
        return {"loss": loss, "logits": logits, "targets": batch[2]}

    t.forward = forward
    return t
