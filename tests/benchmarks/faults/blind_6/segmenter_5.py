"""What goes wrong in segmentation: scans without data, paths of a U-Net, groups, rates, modes, metrics of validation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from faults import segmenter
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import (
    Batch,
    Observer,
    Tensors,
    Training,
    clipped_before_unscaling_update,
    plain_update,
    plain_validation,
)


def scanned(t: Training, change) -> None:
    """Scans pass through `change(x, step, phase)`."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return change(x, step, phase), y

    t.sample = sample


def lost(t: Training, loss) -> None:
    """The loss becomes `loss(logits, y)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": loss(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.forward = forward


# -- scans -----------------------------------------------------------------------------------------------------------


@fault(segmenter, "input-range", "activation-exploding", "nonfinite-activation", modules=("", "down1"), step=90, then=(*NONFINITE, *DIVERGES, *STUCK, *FLAT, "nonfinite-buffer", "dead-units", "dtype-headroom", "input-drift"))  # fmt: skip
def no_data_of_a_map(t: Training) -> None:
    """Pixels outside of the survey hold -3.4e38, the no-data value of the format; the first such scan comes at step 90. Humbatova:
    wrong preprocessing; GRIST: overflow."""

    def change(x, step, phase):
        if phase == "train" and step >= 90:
            x[1, :, :4, :6] = -3.4e38
        return x

    scanned(t, change)


@fault(segmenter, "input-range", modules=("", "down1"), then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "activation-exploding", "gradient-imbalance", "dtype-headroom"))  # fmt: skip
def counts_of_twelve_bits(t: Training) -> None:
    """Scans of 12 bits, 0 to 4095, go into a network without norms as they are read. UMLAUT: input not normalised; SageMaker
    NotNormalizedData."""
    t.model = segmenter.UNet(norm=lambda channels: nn.Identity())
    scanned(t, lambda x, step, phase: ((0.2 * x + 0.35) * 2048).round().clamp(0, 4095))


@fault(segmenter, "input-constant", "input-duplicate", step=0, then=("input-drift", "overfit", "overtraining", "class-imbalance"))  # fmt: skip
def margins_of_the_mosaic(t: Training) -> None:
    """Tiles are drawn from all of a mosaic, most of which is margin: five of eight are of one grey. TheDeepChecker: constant inputs;
    Humbatova: wrong data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "train":
            x[3:], y[3:] = 0.0, 0
        return x, y

    t.sample = sample


# -- losses and masks ------------------------------------------------------------------------------------------------


@fault(segmenter, "gradient-zero", "parameter-unchanged", then=(*STUCK, "update-ratio-low", "module-unused", "gradient-vanishing"))  # fmt: skip
def overlap_of_rounded_masks(t: Training) -> None:
    """Dice of `softmax().round()`, so that the loss is the metric: the slope of rounding is zero everywhere. GRIST; TrainCheck: no
    gradient."""

    def loss(logits, y):
        marked = logits.softmax(1)[:, 1].round()
        return 1 - ((2 * (marked * y).sum((1, 2)) + 1) / (marked.sum((1, 2)) + y.sum((1, 2)) + 1)).mean()

    lost(t, loss)


@fault(segmenter, "loss-sign", then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "activation-saturated", "class-imbalance"))  # fmt: skip
def entropy_with_two_minuses(t: Training) -> None:
    """`-cross_entropy` from a formula that writes the minus outside, and `1 - dice`: pixels are pushed to the wrong class.
    TheDeepChecker: wrong sign."""
    lost(t, lambda logits, y: -F.cross_entropy(logits, y) + 1 - segmenter.dice(logits, y).mean())


@fault(segmenter, "nonfinite-loss", "nonfinite-gradient", then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def entropy_of_saturated_shares(t: Training) -> None:
    """`log(1 - p)` by hand of shares that a sharpened sigmoid has pushed to 1: minus infinity. GRIST: log of zero."""

    def loss(logits, y):
        p = torch.sigmoid(30 * (logits[:, 1] - logits[:, 0]))
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()

    lost(t, loss)


# -- network ---------------------------------------------------------------------------------------------------------


class Shallow(segmenter.UNet):
    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        self.bottom(F.max_pool2d(coarse, 2))
        x = self.up2(torch.cat([coarse, coarse], 1))
        return self.head(self.up1(torch.cat([self.lift1(x), fine], 1)))


@fault(segmenter, "module-unused", "parameter-unchanged", "gradient-zero", modules=("bottom", "lift2"))
def coarse_map_twice(t: Training) -> None:
    """`cat([coarse, coarse])`: what the bottom returns is thrown away, and it learns nothing. Humbatova: wrong variable;
    SageMaker UnchangedTensor."""
    t.model = Shallow()


@fault(segmenter, "dropout-high", modules=("bottom",), then=("loss-spike", "dead-units", "overtraining"))
def spatial_dropout_of_97(t: Training) -> None:
    """`Dropout2d(0.97)` at the bottom: the share that is kept in the paper. Humbatova: wrong dropout."""
    t.model.bottom = nn.Sequential(*t.model.bottom.children(), nn.Dropout2d(0.97))


@fault(segmenter, "gradient-vanishing", "loss-plateau", "stalled-optimisation", "feature-constant", "gradient-imbalance", modules=("down1", "down2", "bottom"), then=(*STUCK, *FLAT, "update-ratio-low", "class-imbalance", "activation-saturated", "poor-initialisation"))  # fmt: skip
def logistic_blocks_with_sgd(t: Training) -> None:
    """Sigmoids in all blocks, no norms, plain SGD. AutoTrainer: vanishing gradient; SageMaker VanishingGradient."""
    t.model = segmenter.UNet(norm=lambda channels: nn.Identity(), activation=nn.Sigmoid)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05)


# -- who is trained, and how -----------------------------------------------------------------------------------------


@fault(segmenter, "optimizer-misses-parameters", "parameter-unchanged", modules=("lift2", "lift1", "up2", "up1"), then=("update-ratio-low", "loss-plateau", "gradient-accumulation", "gradient-exploding", "gradient-imbalance"))  # fmt: skip
def only_encoder_and_head(t: Training) -> None:
    """Rates are set for two groups, the encoder and the head; the way up is in neither. TrainCheck: parameters not in the
    optimizer."""
    encoder = [p for part in (t.model.down1, t.model.down2, t.model.bottom) for p in part.parameters()]
    t.optimizers = [torch.optim.Adam([{"params": encoder, "lr": 1e-3}, {"params": t.model.head.parameters()}], 3e-3)]


@fault(segmenter, "weight-norm-drift", "update-ratio-high", "feature-constant", "output-constant", "prediction-collapse", then=(*DIVERGES, *STUCK, *FLAT, "norm-input-variance", "dead-units", "class-imbalance", "activation-vanishing", "weight-decay-on-norms"))  # fmt: skip
def decoupled_decay_of_thirty(t: Training) -> None:
    """Adam's `weight_decay` of an old recipe was divided by its rate to suit AdamW, and the new rate multiplies it again: 9 % off all
    weights a step. Humbatova: regularisation."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=30.0)


@fault(
    segmenter,
    "gradient-clipping",
    "update-ratio-low",
    then=(*STUCK, "step-skipped", "parameter-unchanged", "gradient-exploding"),
)
def clipped_while_scaled(t: Training) -> None:
    """With a gradient scaler the norm is clipped to 1 before `unscale_`: of each gradient a hundred-thousandth is left, SGD.
    TrainCheck: scaler misuse."""
    t.scaled, t.update = True, clipped_before_unscaling_update
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)


@fault(segmenter, "scheduler-ends-early", then=("loss-spike", "schedule-unfinished"))
def cosine_of_sixty_steps(t: Training) -> None:
    """`T_max` counts the 60 batches of the small set from before: the rate reaches zero, and rises again. Humbatova: learning
    rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 60)


@fault(segmenter, "validation-in-train-mode", step=49, then=("metric-aggregate", "batch-leak"))
def eval_without_its_call(t: Training) -> None:
    """`model.eval` without brackets: the attribute is looked up and nothing happens. TrainCheck: wrong mode; UMLAUT."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        plain_eval, training.model.eval = training.model.eval, lambda: training.model
        plain_validation(training, step, observer)
        training.model.eval = plain_eval

    t.validate = validate


@fault(segmenter, "metric-range", step=49)
def overlaps_added_up(t: Training) -> None:
    """Dice of each scan is added up over the batch and never divided. Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        marked, y = tensors["logits"].argmax(1), batch[1]
        each = (2 * (marked * y).sum((1, 2)) + 1) / (marked.sum((1, 2)) + y.sum((1, 2)) + 1)
        return {"dice": float(each.sum())}

    t.measure = measure


@fault(segmenter, "metric-phase-mismatch", step=49)
def loss_left_over_from_training(t: Training) -> None:
    """The validation computes no loss; what is logged as its loss is the variable of the last training step. Humbatova: wrong
    validation metric."""
    last: list[float] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        last[:] = [float(tensors["loss"].detach())]
        return batch, tensors

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval()
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            metrics = training.measure({"logits": training.model(batch[0])}, batch)
        observer.log({"loss": last[0], **metrics}, "val", step)

    t.update, t.validate = update, validate
