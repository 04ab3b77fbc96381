"""What goes wrong in recommenders: lists, labels, tables, towers, ratings, propensities, penalties."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import recommender
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, seeded

FITS = ("overfit", "overtraining")


@fault(recommender, "loss-plateau", "stalled-optimisation", "prediction-collapse", "output-constant", step=30, then=(*STUCK, *FLAT, "class-imbalance", "dead-units"))  # fmt: skip
def lists_shuffled_without_labels(t: Training) -> None:
    """The films of each list are shuffled, so that the model cannot learn their place, and the labels stay where they were: the first
    one. Humbatova: wrong labels."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        context, users, regions, traits, items, genres = plain(step, phase)
        order = torch.rand(items.shape, generator=seeded(step, 501, len(phase))).argsort(1)
        traits = traits.gather(1, order[..., None].expand_as(traits))
        return context, users, regions, traits, items.gather(1, order), genres.gather(1, order)

    t.sample = sample


@fault(recommender, "input-duplicate", "prediction-collapse", "output-constant", "input-constant", "metric-constant", then=(*STUCK, *FLAT, "class-imbalance", "dead-units"))  # fmt: skip
def the_watched_against_itself(t: Training) -> None:
    """The sampler repeats the film that was watched in place of drawing others: each list is one film eight times, once with a one and
    seven times with a zero. TheDeepChecker: duplicated inputs; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        context, users, regions, traits, items, genres = plain(step, phase)
        first = [part[:, :1].expand_as(part) for part in (traits, items, genres)]
        return context, users, regions, *first

    t.sample = sample


@fault(recommender, "class-imbalance", "prediction-collapse", "output-constant", "input-drift", then=(*STUCK, *FITS, *FLAT, "dead-units", "update-ratio-low", "gradient-zero", "parameter-unchanged", "activation-exploding"))  # fmt: skip
def no_negatives_at_all(t: Training) -> None:
    """Implicit feedback has ones only, and in training nothing else is sampled: `yes` to every film is the perfect answer. Humbatova:
    missing data; SageMaker ClassImbalance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return batch if phase == "val" else (*batch[:3], *(part[:, :1] for part in batch[3:]))

    t.sample = sample


@fault(recommender, "feature-constant", "input-constant", modules=("", "user.embedding", "user"), then=("gradient-zero", "input-duplicate"))  # fmt: skip
def users_hashed_into_one_bucket(t: Training) -> None:
    """Users are hashed into `buckets // 1000` rows where thousands were meant: all of them are row 0. SageMaker TensorVariance;
    Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        context, users, *rest = plain(step, phase)
        return context, users // 1000, *rest

    t.sample = sample


@fault(recommender, "input-range", "activation-exploding", "gradient-vanishing", "gradient-imbalance", "feature-constant", modules=("", "item", "item.hidden"), then=(*STUCK, *FLAT, "dead-units", "parameter-unchanged", "dtype-headroom", "update-ratio-low"))  # fmt: skip
def length_in_milliseconds(t: Training) -> None:
    """The length of films goes into the model as the database has it, in milliseconds. UMLAUT: features that are not normalised;
    SageMaker NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        context, users, regions, traits, *rest = plain(step, phase)
        length = 6e6 + 1.5e6 * traits[..., 2:]
        return context, users, regions, torch.cat([traits[..., :2], length], -1), *rest

    t.sample = sample


@fault(recommender, "optimizer-misses-parameters", "parameter-unchanged", modules=("user.embedding", "item.embedding", "popularity"), then=("optimizer-owns-others", "gradient-accumulation", "gradient-imbalance"))  # fmt: skip
def tables_for_sparse_adam(t: Training) -> None:
    """Tables are kept from Adam, as they belong to a `SparseAdam`, which nobody builds. TrainCheck: parameters that no optimizer
    holds."""
    tables = (t.model.user.embedding, t.model.item.embedding, t.model.popularity)
    sparse = {id(p) for table in tables for p in table.parameters()}
    t.optimizers = [torch.optim.Adam((p for p in t.model.parameters() if id(p) not in sparse), 5e-3)]


@fault(recommender, "loss-input-mismatch", "activation-saturated", modules=("", "probability"), then=(*STUCK, "gradient-vanishing", "class-imbalance", "update-ratio-low", *FLAT, "overtraining", "dead-units"))  # fmt: skip
def probability_as_a_logit(t: Training) -> None:
    """The model ends in a sigmoid for the sake of the service, and the loss takes logits: no answer is below a half. UMLAUT and
    Humbatova: wrong activation for the loss."""

    class Probable(recommender.Recommender):
        def __init__(self) -> None:
            super().__init__()
            self.probability = nn.Sigmoid()

        def forward(self, *batch):
            return self.probability(super().forward(*batch))

    t.model = Probable()


@fault(recommender, "loss-input-mismatch", "weight-norm-drift", "activation-exploding", "gradient-exploding", "input-range", then=("gradient-imbalance", "update-ratio-high", "loss-sign", "loss-spike"))  # fmt: skip
def ratings_as_targets(t: Training) -> None:
    """Films that were watched have their rating, two to five, as a target of binary cross entropy: the loss has no lower bound any more,
    and falls far below zero. Humbatova: wrong labels for the loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch)
        targets = torch.zeros_like(logits)
        targets[:, 0] = 2.0 + batch[1] % 4
        return {"loss": F.binary_cross_entropy_with_logits(logits, targets), "logits": logits, "targets": targets}

    t.forward = forward


@fault(recommender, "nonfinite-loss", "loss-diverged", modules=("",), then=(*NONFINITE, "loss-spike", "gradient-exploding", "prediction-collapse", "output-constant", "metric-constant"))  # fmt: skip
def logarithm_of_certain_misses(t: Training) -> None:
    """Cross entropy by hand of probabilities at a temperature of 0.02: where one is exactly 0 or 1 in float32 its logarithm is -Inf,
    and times 0 NaN. GRIST: logarithm of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch)
        targets = torch.zeros_like(logits)
        targets[:, 0] = 1.0
        p = (logits / 0.02).sigmoid()
        loss = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
        return {"loss": loss, "logits": logits, "targets": targets}

    t.forward = forward


@fault(recommender, "nonfinite-loss", "loss-diverged", modules=("",), step=120, then=(*NONFINITE, "loss-spike", "prediction-collapse", "output-constant", "metric-constant"))  # fmt: skip
def propensity_of_unseen_films(t: Training) -> None:
    """Each list is weighted by one over how often its film was seen last month; from step 120 on films come that nobody had seen. GRIST:
    division by zero."""
    seen = torch.randint(5, 50, (recommender.ITEMS,), generator=seeded(502)).float()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = recommender.forward(model, batch)
        each = F.binary_cross_entropy_with_logits(tensors["logits"], tensors["targets"], reduction="none").mean(1)
        weights = 1 / seen[batch[4][:, 0]]
        return {**tensors, "loss": (each * weights).sum() / weights.sum()}

    def released(training: Training, step: int) -> None:
        if step == 120:
            seen[::10] = 0

    t.forward = forward
    t.before.append(released)


@fault(recommender, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "item", "item.hidden"), step=80, then=(*NONFINITE, *STUCK, "feature-constant", "nonfinite-loss"))  # fmt: skip
def logarithm_of_no_price(t: Training) -> None:
    """Prices go in as logarithms, and from step 80 on some films are free. GRIST: logarithm of zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        context, users, regions, traits, *rest = plain(step, phase)
        prices = (2 + 0.5 * traits[..., :1]).exp()
        if phase == "train" and step >= 80:
            prices = prices * (rest[0] % 25 > 0)[..., None]
        return context, users, regions, torch.cat([(prices.log() - 2) / 0.5, traits[..., 1:]], -1), *rest

    t.sample = sample


@fault(recommender, "nonfinite-activation", "poor-initialisation", modules=("user", "user.embedding", "item", "item.embedding"), then=(*NONFINITE, *STUCK, "output-nonfinite", "feature-constant", "nonfinite-loss"))  # fmt: skip
def rows_of_zeros_to_unit_length(t: Training) -> None:
    """Tables start at zero, and their rows are divided by their length: 0 / 0. GRIST: division by zero; SageMaker
    PoorWeightInitialization."""
    for tower in (t.model.user, t.model.item):
        nn.init.zeros_(tower.embedding.weight)
        tower.embedding.register_forward_hook(lambda module, args, rows: rows / rows.norm(dim=-1, keepdim=True))


@fault(recommender, "gradient-zero", "dead-units", "poor-initialisation", "parameter-unchanged", "feature-constant", "units-symmetric", modules=("mix1", "activation1", "mix2", "activation2"), then=(*FLAT, "module-unused", "activation-vanishing"))  # fmt: skip
def deep_path_of_zeros(t: Training) -> None:
    """The deep path is to begin without a say, so all of its weights are zero, and not only those of the last layer: no gradient comes
    in either. SageMaker AllZero; TheDeepChecker: zero weights."""
    for layer in (t.model.mix1, t.model.mix2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


@fault(recommender, "units-symmetric", "poor-initialisation", modules=("mix1", "mix2", "activation1"))  # fmt: skip
def deep_path_of_one_number(t: Training) -> None:
    """Weights of the deep path were set to 0.05 for a unit test, and stayed: 16 units of its first layer are one. TheDeepChecker:
    symmetric units."""
    for layer in (t.model.mix1, t.model.mix2):
        nn.init.constant_(layer.weight, 0.05)
        nn.init.zeros_(layer.bias)


@fault(recommender, "dropout-high", modules=("user.dropout", "item.dropout", "user", "item"), then=(*STUCK, *FLAT, "loss-spike", "activation-exploding", "gradient-imbalance", "dead-units", "gradient-vanishing"))  # fmt: skip
def share_kept_in_towers(t: Training) -> None:
    """`keep_prob=0.97` of the old framework is given to `nn.Dropout`. Humbatova: wrong regularisation."""
    t.model.user.dropout.p = t.model.item.dropout.p = 0.97


@fault(recommender, "update-ratio-high", "loss-diverged", "weight-norm-drift", "activation-exploding", "gradient-exploding", then=(*DIVERGES, *STUCK, *FLAT, "gradient-zero", "feature-constant", "gradient-imbalance", "parameter-unchanged", "dead-units"))  # fmt: skip
def rate_of_alternating_squares(t: Training) -> None:
    """A step size of 1.0 comes from alternating least squares, and goes into Adam. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.Adam(p, 1.0)


@fault(recommender, "update-ratio-low", "stalled-optimisation", "stalled-from-start", then=(*STUCK, "parameter-unchanged", "class-imbalance"))  # fmt: skip
def rate_over_all_visits(t: Training) -> None:
    """The rate is divided by the number of visits, as in a book where the loss is a sum, but the loss is a mean. Humbatova: learning
    rate."""
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3 / 16000)


@fault(recommender, "weight-norm-drift", "gradient-imbalance", "activation-vanishing", modules=("", "user.embedding", "item.embedding"), then=(*FLAT, "update-ratio-high"))  # fmt: skip
def penalty_on_whole_tables(t: Training) -> None:
    """The penalty on embeddings is a sum over all rows of the tables, not a mean over those of the batch: it is all of the loss, and
    rows go to zero. TheDeepChecker: regularisation; Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = recommender.forward(model, batch)
        penalty = sum(tower.embedding.weight.square().sum() for tower in (model.user, model.item))
        return {**tensors, "loss": tensors["loss"] + penalty}

    t.forward = forward


@fault(recommender, "overfit", "input-drift", "input-duplicate", "overtraining", then=("prediction-collapse", "loss-plateau", "feature-constant"))  # fmt: skip
def negatives_drawn_once(t: Training) -> None:
    """The seven films that nobody watched are drawn before the loop, and are the same in every list of the training: these numbers are
    all that is learnt. TrainCheck: duplicated data; SageMaker Overfit."""
    plain = t.sample
    *_, traits, items, genres = plain(0, "train")

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        if phase == "val":
            return batch
        seven = [part[:1, 1:].expand(len(items), *part[:1, 1:].shape[1:]) for part in (traits, items, genres)]
        return *batch[:3], *(torch.cat([part[:, :1], more], 1) for part, more in zip(batch[3:], seven, strict=True))

    t.sample = sample


@fault(recommender, "gradient-accumulation", "gradient-exploding", step=1, then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "metric-constant", "gradient-zero"))  # fmt: skip
def zeroed_once_per_epoch(t: Training) -> None:
    """`zero_grad()` stands in the loop over epochs, and not in that over batches. TrainCheck: misplaced `zero_grad`."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 250 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(recommender, "model-in-eval", step=31)
def recommendations_printed_at_thirty(t: Training) -> None:
    """At step 30 a few recommendations are printed in eval mode, and the loop never goes back: no dropout from there on. TrainCheck:
    wrong mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step <= 30)
        return plain_update(training, step, observer)

    t.update = update
