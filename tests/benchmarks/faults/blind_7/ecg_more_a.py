"""What else goes wrong in reading electrocardiograms: the optimizer, rates, modes, start weights, scalers, metrics."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import ecg
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import (
    Batch,
    Observer,
    Tensors,
    Training,
    clipped_before_unscaling_update,
    mean_of,
    plain_update,
)

# -- the optimizer ---------------------------------------------------------------------------------------------------


@fault(ecg, "optimizer-misses-parameters", "parameter-unchanged", modules=("stem",), then=("optimizer-owns-others", "gradient-accumulation", "gradient-exploding", "gradient-imbalance"))  # fmt: skip
def ecg_stem_in_no_group(t: Training) -> None:
    """A group for the blocks, another one with a higher rate for the head; the stem was to come with a third. TrainCheck: parameters not
    in the optimizer."""
    groups = [{"params": t.model.blocks.parameters()}, {"params": t.model.head.parameters(), "lr": 5e-3}]
    t.optimizers = [torch.optim.Adam(groups, 2e-3)]


@fault(ecg, "update-ratio-high", "loss-diverged", "loss-spike", "weight-norm-drift", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "overfit", "overtraining", "gradient-zero", "units-symmetric", "parameter-unchanged", "dtype-headroom", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def ecg_rate_without_its_exponent(t: Training) -> None:
    """`lr=2`, since the sweep's file holds mantissas only. Humbatova: learning rate; SageMaker WeightUpdateRatio; AutoTrainer: oscillating
    loss."""
    t.optimize = lambda p: torch.optim.Adam(p, 2.0)


@fault(ecg, "update-ratio-low", "stalled-optimisation", "schedule-unfinished", then=(*STUCK, "parameter-unchanged", "prediction-collapse"))  # fmt: skip
def ecg_warm_up_of_the_large_set(t: Training) -> None:
    """A warm-up of 200,000 steps, a tenth of a run on two million records, is kept for a run of 180 steps. Humbatova: learning rate;
    SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 200_000))


@fault(ecg, "scheduler-ends-early", then=("update-ratio-low", "loss-plateau", "loss-spike", "overtraining", "schedule-unfinished"))  # fmt: skip
def ecg_cosine_of_one_epoch(t: Training) -> None:
    """`T_max` is the length of the loader, 75 batches, without the number of epochs: the rate falls to zero and comes back. Humbatova:
    learning rate; TrainCheck: schedules."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 75)


@fault(ecg, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, "overfit", "overtraining", "gradient-clipping"))
def ecg_gradients_of_the_average_zeroed(t: Training) -> None:
    """`average.zero_grad()`, where `model.zero_grad()` belongs: the averaged copy has no gradients, and those of the model add up.
    TrainCheck: misplaced `zero_grad`."""
    average = copy.deepcopy(t.model)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        average.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        observer.backward_done(training, step)
        training.optimizer.step()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), training.model.parameters(), strict=True):
                mean.lerp_(now, 0.02)
        return batch, tensors

    t.update = update


@fault(
    ecg,
    "parameter-unchanged",
    "update-ratio-low",
    then=(*STUCK, "optimizer-owns-others"),
)
def ecg_best_weights_put_back(t: Training) -> None:
    """The best weights are put back whenever a step was no better, and better is `>` of an AUROC that is told in validation only: the first
    ones, at each step. TrainCheck: parameters not updated."""
    best = copy.deepcopy(t.model.state_dict())
    t.after_step.append(lambda training, step: training.model.load_state_dict(best))


@fault(ecg, "gradient-clipping", "update-ratio-low", "stalled-optimisation", "parameter-unchanged", then=(*STUCK, "gradient-vanishing", "gradient-exploding", "optimizer-owns-others"))  # fmt: skip
def ecg_clipped_while_scaled(t: Training) -> None:
    """Gradients are clipped to 1 before the scaler divides them by 65536, with SGD. TrainCheck: misuse of the scaler, wrong clip; speech:
    PyTorch's own examples of mixed precision warn of it."""
    t.optimize, t.scaled = (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)), True
    t.update = clipped_before_unscaling_update


@fault(ecg, "weight-norm-drift", "activation-vanishing", "norm-input-variance", "feature-constant", "prediction-collapse", "output-constant", modules=("", "stem", "blocks", "head"), step=5, then=(*STUCK, *FLAT, "weight-decay-on-norms", "update-ratio-high", "gradient-vanishing", "gradient-exploding", "dead-units", "gradient-zero", "gradient-imbalance"))  # fmt: skip
def ecg_decay_divided_by_the_rate(t: Training) -> None:
    """A decay of 0.1 is divided by the rate, as for an optimizer that does not multiply it: `AdamW(weight_decay=50)` takes a tenth of every
    weight at each step. TheDeepChecker: regularisation; Humbatova."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=50.0)


@fault(ecg, "units-symmetric", "poor-initialisation", modules=("stem", "blocks", "head", ""), then=(*STUCK, *FLAT, "gradient-imbalance"))  # fmt: skip
def ecg_weights_of_one_hundredth(t: Training) -> None:
    """Convolutions and layers start at 0.01 everywhere, for runs that can be repeated: all filters of a layer are one. TheDeepChecker:
    symmetric initialisation; SageMaker PoorWeightInitialization."""
    t.model = ecg.Reader(dropout=0.0)
    for module in t.model.modules():
        if isinstance(module, (nn.Conv1d, nn.Linear)):
            nn.init.constant_(module.weight, 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@fault(ecg, "activation-exploding", "poor-initialisation", "gradient-exploding", modules=("", "stem", "blocks", "head"), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "dead-units", "gradient-imbalance", "update-ratio-low", "dtype-headroom", "overfit", "overtraining"))  # fmt: skip
def ecg_normal_filters_without_norms(t: Training) -> None:
    """Norms are left out for the device, and filters are drawn by `normal_()` with a deviation of one: each layer makes the signal ten
    times larger. SageMaker PoorWeightInitialization and ExplodingTensor; TheDeepChecker."""
    t.model = ecg.Reader(norm=lambda channels: nn.Identity())
    for module in t.model.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight)


@fault(ecg, "loss-diverged", "gradient-exploding", "activation-exploding", "update-ratio-high", "weight-norm-drift", "loss-spike", step=20, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero", "gradient-imbalance", "overfit", "dtype-headroom", "parameter-unchanged"))  # fmt: skip
def ecg_rate_of_norms_without_norms(t: Training) -> None:
    """SGD with a rate of 2, which a network with norms may bear, in one whose norms were folded away. AutoTrainer: oscillating and
    exploding; Humbatova: learning rate."""
    t.model = ecg.Reader(norm=lambda channels: nn.Identity())
    t.optimize = lambda p: torch.optim.SGD(p, 2.0, momentum=0.9)


# -- modes, dropout, numbers -----------------------------------------------------------------------------------------


@fault(ecg, "model-in-eval", step=30, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing", "loss-spike"))  # fmt: skip
def ecg_left_in_eval(t: Training) -> None:
    """`model.train()` stands in front of the loop and not in it: behind the first validation the run goes on in eval mode. TrainCheck:
    wrong mode; Humbatova: training process."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < training.val_every)
        return plain_update(training, step, observer)

    t.update = update


@fault(ecg, "validation-in-train-mode", step=29)
def ecg_validated_while_training(t: Training) -> None:
    """The function for the validation was copied from the loop, `no_grad()` was added and `eval()` was not. TrainCheck: wrong mode."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        seen: dict[str, list[object]] = {}
        with observer.phase("val"), torch.no_grad():
            for i in range(2):
                batch = training.sample(step * 2 + i, "val")
                tensors = training.forward(training.model, batch)
                for name, value in {"loss": float(tensors["loss"]), **training.measure(tensors, batch)}.items():
                    seen.setdefault(name, []).append(value)
        observer.log({name: mean_of(values) for name, values in seen.items()}, "val", step)

    t.validate = validate


@fault(ecg, "dropout-high", modules=("dropout", "blocks.0.dropout", "blocks.1.dropout", "blocks.2.dropout", "head", "blocks", ""), then=(*STUCK, *FLAT, "overtraining", "prediction-collapse", "dead-units", "gradient-exploding", "activation-exploding"))  # fmt: skip
def ecg_share_that_is_kept(t: Training) -> None:
    """`Dropout(0.96)` from a paper that gives the share that is kept. TheDeepChecker: dropout; Humbatova: regularisation."""
    t.model = ecg.Reader(dropout=0.96)


@fault(ecg, "nonfinite-gradient", "nonfinite-parameter", modules=("", "head"), then=(*NONFINITE, *STUCK, "nonfinite-buffer"))  # fmt: skip
def ecg_distance_of_a_record_to_itself(t: Training) -> None:
    """Distances between the logits of records are to follow those between their findings; each record has a distance of zero to itself,
    where the slope of the root is infinite. GRIST: square root of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = ecg.forward(model, batch)
        told, true = (((x[:, None] - x) ** 2).sum(2).sqrt() for x in (tensors["logits"], batch[1]))
        return {**tensors, "loss": tensors["loss"] + 0.05 * F.mse_loss(told, true)}

    t.forward = forward


@fault(ecg, "nonfinite-gradient", "step-skipped", "parameter-unchanged", modules=("", "stem", "stem.norm", "blocks"), then=(*NONFINITE, *STUCK, "update-ratio-low", "optimizer-owns-others"))  # fmt: skip
def ecg_lasso_behind_a_scaler(t: Training) -> None:
    """A group lasso with the root of sums of squares, among them those of biases, which start at zero; a gradient scaler leaves out each
    step with a NaN, without a word: all of them. GRIST: square root of zero; TrainCheck: misuse of the scaler."""
    t.scaled = True

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = ecg.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] + 1e-4 * sum(p.square().sum().sqrt() for p in model.parameters())}

    t.forward = forward


class AttentiveReader(ecg.Reader):
    """Pools with weights over time, by a softmax of one's own."""

    def forward(self, x):
        x = self.blocks(self.stem(x))
        weights = x.sum(1, keepdim=True).exp()
        x = torch.cat([(x * weights).sum(2) / weights.sum(2), x.amax(2)], 1)
        return self.head(self.dropout(x))


@fault(ecg, "nonfinite-activation", modules=("", "dropout", "head"), then=(*NONFINITE, *STUCK, "nonfinite-buffer", "gradient-exploding", "activation-saturated"))  # fmt: skip
def ecg_softmax_over_time_by_hand(t: Training) -> None:
    """Weights of time are exponentials over their sum, without taking the maximum off first, of sums over channels: Inf / Inf. GRIST:
    overflow of exp, softmax by hand."""
    t.model = AttentiveReader(width=24)


# -- metrics ---------------------------------------------------------------------------------------------------------


@fault(ecg, "metric-range", step=29)
def ecg_f1_in_percent(t: Training) -> None:
    """F1 is multiplied by a hundred for the table of the paper, and logged like that. Humbatova: wrong metrics."""
    plain = t.measure
    t.measure = lambda tensors, batch: {**plain(tensors, batch), "f1": 100 * plain(tensors, batch)["f1"]}


@fault(ecg, "metric-constant", step=29)
def ecg_exact_match_of_probabilities(t: Training) -> None:
    """Accuracy compares probabilities with findings for equality, and no probability is ever exactly one: 0.0 throughout. Humbatova: wrong
    metrics."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        exact = (tensors["logits"].sigmoid() == batch[1]).all(1).float().mean()
        return {**plain(tensors, batch), "accuracy": float(exact)}

    t.measure = measure


@fault(ecg, "metric-nonfinite", step=29)
def ecg_recall_of_absent_findings(t: Training) -> None:
    """The table of findings has a sixth column, "other", which no record has: 0 / 0 in the mean of recalls. GRIST: division by zero;
    Humbatova: wrong metrics."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        true = F.pad(batch[1], (0, 1)) > 0
        told = F.pad(tensors["logits"], (0, 1), value=-1.0) > 0
        return {**plain(tensors, batch), "recall": float(((told & true).sum(0) / true.sum(0)).mean())}

    t.measure = measure
