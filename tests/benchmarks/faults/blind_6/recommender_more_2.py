"""What goes wrong in recommenders: validation, metrics, towers that nothing reaches, clicks that are rare, schedules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from faults import recommender
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, mean_of, seeded

if TYPE_CHECKING:
    from torch.nn import Module

FITS = ("overfit", "overtraining")


@fault(recommender, "input-drift", "input-constant", step=49, then=(*FITS, "input-duplicate", "feature-constant", "input-range"))  # fmt: skip
def films_not_joined_in_validation(t: Training) -> None:
    """The validation file is not joined with the table of films: their numbers are zero, and their genre is the first. Humbatova: wrong
    preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        context, users, regions, traits, items, genres = plain(step, phase)
        if phase == "val":
            traits, genres = torch.zeros_like(traits), torch.zeros_like(genres)
        return context, users, regions, traits, items, genres

    t.sample = sample


@fault(recommender, "input-drift", "input-range", step=49, then=(*FITS, "loss-diverged", "activation-exploding"))
def context_standardised_in_training_only(t: Training) -> None:
    """Age in years and activity in visits per month: only the training reader takes mean and deviation out. Humbatova: wrong
    preprocessing; SageMaker NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        context, *rest = plain(step, phase)
        if phase == "val":
            context = context * torch.tensor([12.0, 25.0, 1.0, 1.0]) + torch.tensor([41.0, 70.0, 0.0, 0.0])
        return context, *rest

    t.sample = sample


@fault(recommender, "metric-nonfinite", step=49, then=("metric-range",))  # fmt: skip
def gain_of_rank_zero(t: Training) -> None:
    """The discounted gain is one over the logarithm of the rank plus one, and ranks count from zero: that of a hit is infinite. GRIST:
    division by zero; Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        logits = tensors["logits"]
        ranks = (logits[:, 1:] >= logits[:, :1]).sum(1)
        return {"ndcg": float((1 / torch.log2(ranks + 1.0)).mean()), **recommender.measure(tensors, batch)}

    t.measure = measure


@fault(recommender, "metric-constant", step=49, then=("metric-phase-mismatch",))
def tensors_looked_up_in_a_set(t: Training) -> None:
    """The best film of each list is looked up in the set of those watched, and both are tensors, which are equal to themselves only: a
    recall of 0.0. Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        best = batch[4].gather(1, tensors["logits"].argmax(1, keepdim=True))[:, 0]
        watched = set(batch[4][:, 0].unbind())
        found = sum(film in watched for film in best.unbind())
        return {"recall": found / len(best), "auc": recommender.measure(tensors, batch)["auc"]}

    t.measure = measure


@fault(recommender, "metric-type", step=49)
def auc_of_each_user(t: Training) -> None:
    """The function of a library returns one AUC for each list where `average=None` was meant to be a default: a list is logged.
    Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        logits = tensors["logits"]
        each = (logits[:, 1:] < logits[:, :1]).float().mean(1)
        return {**recommender.measure(tensors, batch), "auc": each.tolist()}

    t.measure = measure


@fault(recommender, "metric-range", step=49, then=("metric-aggregate",))
def hit_rate_is_a_count(t: Training) -> None:
    """Hits are summed over the lists, and nobody divides: a hit rate above a hundred. Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        hits = tensors["logits"].argmax(1) == 0
        return {"hit_rate": float(hits.sum()), "auc": recommender.measure(tensors, batch)["auc"]}

    t.measure = measure


@fault(recommender, "metric-vanished", "metric-missing", step=149, then=("metric-phase-mismatch",))  # fmt: skip
def coverage_until_a_film_is_new(t: Training) -> None:
    """Coverage is left out of the dictionary where a list holds a film without a name, as all do from the third validation on. Speech:
    wenet-e2e/wenet#2430; Humbatova: wrong validation metric."""
    calls: list[int] = []

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        calls.append(1)
        metrics = recommender.measure(tensors, batch)
        if len(calls) <= 4:
            best = batch[4].gather(1, tensors["logits"].argmax(1, keepdim=True))
            metrics["coverage"] = len(best.unique()) / recommender.ITEMS
        return metrics

    t.measure = measure


@fault(recommender, "validation-in-train-mode", step=49)
def validated_with_dropout(t: Training) -> None:
    """The validation has `no_grad()`, which was taken for `eval()`. TrainCheck: wrong mode."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        metrics: dict[str, list[object]] = {}
        with observer.phase("val"), torch.no_grad():
            for i in range(2):
                batch = training.sample(step * 2 + i, "val")
                tensors = training.forward(training.model, batch)
                for name, value in {"loss": float(tensors["loss"]), **training.measure(tensors, batch)}.items():
                    metrics.setdefault(name, []).append(value)
        observer.log({name: mean_of(values) for name, values in metrics.items()}, "val", step)

    t.validate = validate


@fault(recommender, "module-unused", "parameter-unchanged", modules=("history",), then=("gradient-zero",))
def history_never_read(t: Training) -> None:
    """A GRU over the films seen before was written and put into the model, and `forward` does not call it. TrainCheck: parameters that
    do not change; SageMaker UnchangedTensor."""
    t.model.history = nn.GRU(recommender.WIDTH, recommender.WIDTH, batch_first=True)


@fault(recommender, "gradient-zero", "parameter-unchanged", modules=("user",), then=("module-unused", "optimizer-frozen-parameters"))  # fmt: skip
def users_from_a_cache(t: Training) -> None:
    """Vectors of users are computed once per step under `no_grad()`, for a cache that is shared by all lists: the tower of users stays
    as it was drawn. TrainCheck: a part without gradients."""
    encode = t.model.user.forward
    t.model.user.forward = torch.no_grad()(encode)


@fault(recommender, "optimizer-duplicate-parameters", modules=("popularity", ""))  # fmt: skip
def popularity_in_two_groups(t: Training) -> None:
    """Tables have an optimizer of their own, and the one for all other parameters holds the popularity of films as well: it is moved
    twice. TrainCheck: parameters in two optimizers."""
    tables = [*t.model.user.embedding.parameters(), *t.model.item.embedding.parameters(), *t.model.popularity.parameters()]  # fmt: skip
    held = {id(p) for p in tables[:2]}
    t.optimizers = [torch.optim.Adam((p for p in t.model.parameters() if id(p) not in held), 5e-3)]
    t.optimizers.append(torch.optim.Adagrad(tables, 0.01))
    t.before.append(lambda training, step: training.optimizers[1].zero_grad())
    t.after_step.append(lambda training, step: training.optimizers[1].step())


@fault(recommender, "optimizer-frozen-parameters", modules=("item", ""), then=("gradient-zero", "parameter-unchanged", "module-unused"))  # fmt: skip
def films_frozen_since_the_pretraining(t: Training) -> None:
    """The tower of films was frozen while that of users was tried out, the line is still there, and the optimizer is given all
    parameters. TrainCheck: frozen parameters; SageMaker UnchangedTensor."""
    t.model.item.requires_grad_(False)
    t.optimizers = [torch.optim.Adam(t.model.parameters(), 5e-3)]


@fault(recommender, "class-imbalance", "prediction-collapse", then=(*STUCK, *FLAT, "dead-units"))  # fmt: skip
def purchases_are_rare(t: Training) -> None:
    """A purchase is one film of a thousand that were shown, and the cross entropy weighs all alike: `no` is the answer to everything.
    SageMaker ClassImbalance; Humbatova: unbalanced data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        context, users, regions, *lists = plain(step, phase)
        bought = torch.rand(len(users), 1, generator=seeded(511, step, len(phase))) < 0.01
        return context, users, regions, *lists, bought

    def forward(model: Module, batch: Batch) -> Tensors:
        logits = model(*batch[:6])
        targets = torch.zeros_like(logits)
        targets[:, :1] = batch[6].float()
        return {"loss": F.binary_cross_entropy_with_logits(logits, targets), "logits": logits, "targets": targets}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        said, right = tensors["logits"] > 0, tensors["targets"] > 0
        return {"accuracy": float((said == right).float().mean()), "recall": float((said & right).sum() / right.sum().clamp(min=1))}  # fmt: skip

    t.sample, t.forward, t.measure = sample, forward, measure


@fault(recommender, "update-ratio-low", "schedule-unfinished", "stalled-optimisation", then=(*STUCK, "parameter-unchanged", "schedule-unreachable"))  # fmt: skip
def warm_up_of_a_million(t: Training) -> None:
    """The warm-up is counted in lists, a million of them, and the scheduler is stepped once for each batch of 64: it has hardly begun
    when the run ends. Humbatova: learning rate."""
    t.schedule = lambda optimizer: LinearLR(optimizer, 1e-6, total_iters=1_000_000)


@fault(recommender, "poor-initialisation", "activation-exploding", "update-ratio-low", modules=("user", "user.embedding", "item", "item.embedding", ""), then=(*DIVERGES, *STUCK, "gradient-imbalance", "dead-units", "dtype-headroom", "feature-constant"))  # fmt: skip
def tables_drawn_between_their_ends(t: Training) -> None:
    """`uniform_(-rows, rows)` for `uniform_(-1 / rows, 1 / rows)`, in towers without normalisation: a hundred in place of a tenth, which
    no step of Adam ever moves. SageMaker PoorWeightInitialization; SageMaker ExplodingTensor."""
    t.model = recommender.Recommender(norm=lambda width: nn.Identity())
    for table in (t.model.user.embedding, t.model.item.embedding):
        nn.init.uniform_(table.weight, -table.num_embeddings, table.num_embeddings)


@fault(recommender, "activation-saturated", "poor-initialisation", modules=("user.activation", "item.activation", "user", "item", "user.norm", "item.norm"), then=(*STUCK, *FLAT, "gradient-zero", "activation-exploding", "update-ratio-low", "gradient-imbalance"))  # fmt: skip
def gains_of_sixty_before_tanh(t: Training) -> None:
    """A gain of 60, meant for the logits, is given to the norms in front of tanh: all units are at one of their ends. SageMaker
    SaturatedActivation; TheDeepChecker: saturated units."""
    t.model = recommender.Recommender(activation=nn.Tanh)
    for tower in (t.model.user, t.model.item):
        nn.init.constant_(tower.norm.weight, 60.0)


@fault(recommender, "feature-constant", "batch-leak", modules=("user", "user.project"), then=(*FLAT, "loss-plateau", "stalled-optimisation", "gradient-imbalance", "dead-units"))  # fmt: skip
def mean_over_all_users(t: Training) -> None:
    """The vectors of a user's last visits are to be averaged, but the axis is that of the batch: all users of a batch are one. Humbatova:
    wrong axis; SageMaker TensorVariance."""
    t.model.user.project.register_forward_hook(lambda module, args, x: x.mean(0, keepdim=True).expand_as(x))


@fault(recommender, "overfit", "input-duplicate", "overtraining", step=1, then=("loss-plateau",))  # fmt: skip
def one_shard_of_many(t: Training) -> None:
    """Of 250 shards of visits the reader opens the first again and again: 64 visits are all that is ever seen. TrainCheck: duplicated
    data; SageMaker Overfit."""
    plain = t.sample
    t.sample = lambda step, phase: plain(0 if phase == "train" else step, phase)


@fault(recommender, "input-duplicate")  # fmt: skip
def log_was_merged_eight_times(t: Training) -> None:
    """The visits of a day are in eight files of the log, all of which are read in the order of time: each visit comes eight times in a
    row. TrainCheck: duplicated data; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return tuple(part[::8].repeat_interleave(8, 0) for part in batch) if phase == "train" else batch

    t.sample = sample


@fault(recommender, "nonfinite-gradient", "nonfinite-parameter", modules=("", "user", "user.project", "user.embedding", "user.hidden"), then=(*NONFINITE, "prediction-collapse", "output-constant", "metric-constant"))  # fmt: skip
def distance_of_a_user_to_itself(t: Training) -> None:
    """A term that spreads users takes roots of squared distances of all to all, of each to itself as well: the slope of a root at zero is
    infinite. GRIST: square root of zero."""

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors = recommender.forward(model, batch)
        users = model.user(batch[1], batch[2], batch[0])
        distances = (users[:, None] - users[None]).square().sum(-1).sqrt()
        return {**tensors, "loss": tensors["loss"] + 0.01 * (-distances / math.sqrt(recommender.WIDTH)).exp().mean()}

    t.forward = forward
