"""More of what goes wrong in vision transformers: branches, layouts, what writes weights, what is logged."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import patches
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded

MLPS = tuple(f"blocks.{i}.mlp" for i in range(patches.DEPTH))


@fault(patches, "dead-units", "feature-constant", "gradient-zero", "poor-initialisation", modules=MLPS, then=("parameter-unchanged", "module-unused", "update-ratio-low"))  # fmt: skip
def branches_shut_by_their_bias(t: Training) -> None:
    """Biases of the wide layers begin at -10, a recipe for gates, in front of a ReLU: no unit ever opens. SageMaker DeadRelu;
    TheDeepChecker: wrong initialisation of biases."""
    t.model = patches.VisionTransformer(activation=nn.ReLU)
    for block in t.model.blocks:
        nn.init.constant_(block.mlp.wide.bias, -10.0)


@fault(patches, "units-symmetric", "poor-initialisation", modules=(*MLPS, *(f"{name}.wide" for name in MLPS), *(f"{name}.narrow" for name in MLPS)), then=(*FLAT, "gradient-imbalance", "gradient-zero", "dead-units"))  # fmt: skip
def branches_of_one_number(t: Training) -> None:
    """All weights of the MLPs are 0.02, the deviation that `trunc_normal_` should have had: 128 units compute one feature.
    TheDeepChecker: symmetric initialisation."""
    for block in t.model.blocks:
        for parameter in block.mlp.parameters():
            nn.init.constant_(parameter, 0.02 if parameter.ndim > 1 else 0.0)


@fault(patches, "loss-input-mismatch", "activation-saturated", modules=("head", ""), then=(*STUCK, "gradient-vanishing", "gradient-zero"))  # fmt: skip
def scores_between_minus_one_and_one(t: Training) -> None:
    """The head of the original has a tanh in its first of two layers; here it is behind the only one: no score passes 1. Humbatova:
    wrong activation of the last layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Tanh())


@fault(patches, "metric-phase-mismatch", "metric-missing", step=24, then=("metric-unexpected",))
def accuracy_in_training_only(t: Training) -> None:
    """The accuracy is logged at each training step, and the evaluation logs its loss alone. Humbatova: missing validation metric;
    speech: metrics that are missing in validation."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        observer.log({"loss": float(tensors["loss"]), **patches.measure(tensors, batch)}, "train", step)
        return batch, tensors

    t.update, t.measure, t.val_every = update, (lambda tensors, batch: {}), 25


@fault(patches, "metric-phase-mismatch", step=24)
def loss_of_the_last_training_step(t: Training) -> None:
    """`loss` in the function that evaluates is still the global variable of the training loop: its value is logged as that of the
    validation. Humbatova: wrong metrics; TrainCheck: metrics."""
    last = [0.0]

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        last[0] = float(tensors["loss"])
        observer.log({"loss": last[0]}, "train", step)
        return batch, tensors

    t.update, t.val_every = update, 25
    t.validate = lambda training, step, observer: observer.log({"loss": last[0]}, "val", step)


class Mixed(patches.Patches):
    """Sequence first, and then read as if the batch came first."""

    def forward(self, x):
        batch = len(x)
        return self.norm(self.project(x).flatten(2).permute(2, 0, 1).reshape(batch, -1, patches.WIDTH))


@fault(patches, "batch-leak", "loss-plateau", "stalled-optimisation", "stalled-from-start", "prediction-collapse", modules=("patches", ""), step=60, then=(*STUCK, *FLAT, "overfit", "overtraining"))  # fmt: skip
def patches_of_other_pictures(t: Training) -> None:
    """(patches, batch, width) is reshaped to (batch, patches, width), where it should be transposed: each picture is given patches of
    others. Humbatova: wrong axis."""
    t.model.patches = Mixed(patches.WIDTH)


@fault(patches, "parameter-unchanged", modules=("",), then=("update-ratio-low",))
def positions_written_at_every_step(t: Training) -> None:
    """Positions of a table are copied into the parameter in front of each step, from when they were fixed; it still requires a gradient
    and is stepped for nothing. TrainCheck: something writes weights back; SageMaker UnchangedTensor."""
    table = t.model.positions.detach().clone()
    t.after_step.append(lambda training, step: training.model.positions.data.copy_(table))


@fault(patches, "optimizer-duplicate-parameters", modules=("", "head"), then=("update-ratio-high", "loss-spike"))
def head_in_both_groups(t: Training) -> None:
    """`[*model.parameters(), *model.head.parameters()]`, to be sure of the new head: torch warns, and it is moved twice. TrainCheck:
    optimizers and their parameters."""
    both = [*t.model.parameters(), *t.model.head.parameters()]
    t.optimize = lambda p: torch.optim.AdamW(both, 3e-3, weight_decay=0.05)


@fault(patches, "class-imbalance", "prediction-collapse", then=("gradient-vanishing", "overfit", "overtraining", "input-drift", "input-duplicate"))  # fmt: skip
def weeks_of_one_texture(t: Training) -> None:
    """The camera stood in front of one texture for weeks: 49 of 50 pictures show it, validation is balanced, and nothing is weighed.
    SageMaker ClassImbalance; Humbatova: unbalanced data."""
    plain, (x, y) = t.sample, patches.pictures(6000, 41)
    often, rare = (y == 2).nonzero()[:, 0], (y != 2).nonzero()[:, 0]

    def sample(step: int, phase: str) -> Batch:
        made = seeded(42, step)
        some = torch.rand(patches.BATCH, generator=made) < 0.02
        first, second = (k[torch.randint(len(k), (patches.BATCH,), generator=made)] for k in (rare, often))
        chosen = torch.where(some, first, second)
        return (x[chosen], y[chosen]) if phase == "train" else plain(step, phase)

    t.sample = sample


@fault(patches, "loss-sign", "prediction-collapse", "activation-exploding", step=0, then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "overfit", "gradient-vanishing", "dead-units"))  # fmt: skip
def entropy_without_its_minus(t: Training) -> None:
    """Cross entropy by hand, `(wanted * log_softmax).sum(1).mean()`, and the minus is missing: right classes are made unlikely.
    Humbatova: wrong loss; TheDeepChecker."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        wanted = F.one_hot(batch[1], patches.CLASSES)
        return {"loss": (wanted * logits.log_softmax(1)).sum(1).mean(), "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(patches, "parameter-unchanged", "gradient-zero", "step-skipped", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "module-unused"))  # fmt: skip
def zeroed_behind_the_backward_pass(t: Training) -> None:
    """`loss.backward(); optimizer.zero_grad(); optimizer.step()`: the optimizer never sees a gradient. TrainCheck: misplaced `zero_grad`;
    SageMaker UnchangedTensor."""

    def zero(training: Training, step: int) -> None:
        training.optimizer.zero_grad()

    t.after_backward.append(zero)


@fault(patches, "input-range", modules=("", "patches", "patches.project"), then=("gradient-imbalance", "dtype-headroom", *DIVERGES, *STUCK, *FLAT, "norm-input-variance", "gradient-vanishing"))  # fmt: skip
def pixels_of_sixteen_bits(t: Training) -> None:
    """Pictures of a microscope with 16 bits reach the model as they are, 0 to 65535. UMLAUT: input not normalised; SageMaker
    CheckInputImages."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (32768 + 6000 * x).clamp(0, 65535).round(), y

    t.sample = sample


@fault(patches, "metric-range", step=49)
def accuracies_of_crops_added(t: Training) -> None:
    """Three crops of each picture are scored, and their accuracies are added, not averaged: up to 3. Humbatova: wrong metrics; UMLAUT:
    accuracy above one."""
    t.val_every = 25

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"accuracy": sum(patches.measure(tensors, batch)["accuracy"] for _ in range(3))}

    t.measure = measure


@fault(patches, "optimizer-frozen-parameters", modules=("blocks",), then=("parameter-unchanged", "gradient-zero", "loss-plateau", "overtraining"))  # fmt: skip
def blocks_frozen_for_probing(t: Training) -> None:
    """Blocks are frozen for linear probing, and this run begins from random ones; the optimizer holds them. Humbatova: training process;
    TrainCheck: frozen parameters."""
    t.model.blocks.requires_grad_(requires_grad=False)
    t.optimizers = [torch.optim.AdamW(t.model.parameters(), 3e-3, weight_decay=0.05)]


@fault(patches, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "patches"), step=70, then=(*NONFINITE, *STUCK))  # fmt: skip
def contrast_of_an_empty_picture(t: Training) -> None:
    """Each picture is divided by its own deviation; from step 70 on a camera is covered now and then. GRIST: division by zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "train" and step % 10 == 0 and step >= 70:
            x[6] = 0.0
        return x / x.std((1, 2, 3), keepdim=True), y

    t.sample = sample


@fault(patches, "optimizer-owns-others", "optimizer-misses-parameters", "parameter-unchanged", then=(*STUCK, "update-ratio-low", "gradient-accumulation", "gradient-exploding", "gradient-clipping"))  # fmt: skip
def weights_loaded_into_a_new_model(t: Training) -> None:
    """`model = VisionTransformer(); model.load_state_dict(...)` comes behind the optimizer, which keeps the parameters of the first.
    TrainCheck: parameters not in the optimizer; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    state = t.model.state_dict()
    t.model = patches.VisionTransformer()
    t.model.load_state_dict(state)
