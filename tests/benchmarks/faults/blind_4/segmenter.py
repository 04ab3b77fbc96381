"""What goes wrong in segmentation: masks, rare foreground, Dice, skips, initialisation, modes, schedules, previews."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from faults import segmenter
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, plain_validation, seeded

# -- masks and scans -------------------------------------------------------------------------------------------------


@fault(segmenter, "class-imbalance", "prediction-collapse", step=20, then=("metric-constant", "output-constant", "gradient-vanishing", "overtraining", "loss-plateau", "feature-constant"))  # fmt: skip
def one_spot_in_many_scans(t: Training) -> None:
    """Only one scan in twenty has a spot, of some ten pixels, and the loss is the plain cross entropy: 999 of 1000 pixels are
    background, and nothing else is ever marked. SageMaker ClassImbalance; Humbatova: unbalanced data."""
    data = {phase: segmenter.scans(n, n, 1) for phase, n in (("train", 600), ("val", 101))}
    for x, y in data.values():
        empty, blank = torch.arange(len(x)) % 20 > 0, segmenter.scans(len(x), len(x) + 1, 0)
        x[empty], y[empty] = blank[0][empty], 0

    def sample(step: int, phase: str) -> Batch:
        x, y = data[phase]
        chosen = torch.randint(len(x), (segmenter.BATCH,), generator=seeded(71, step, len(phase)))
        return segmenter.standardised(x[chosen]), y[chosen]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward


@fault(segmenter, "loss-plateau", "stalled-optimisation", "prediction-collapse", "class-imbalance", step=60, then=("overfit", "overtraining", "metric-constant"))  # fmt: skip
def masks_of_other_scans(t: Training) -> None:
    """Scans are sorted by name and masks by number, so that scan 10 has the mask of scan 2. Humbatova: wrong labels."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x, y.roll(1 + step % 3, 0)

    t.sample = sample


@fault(segmenter, "class-imbalance", "prediction-collapse", "metric-constant", then=("gradient-vanishing", "output-constant", "update-ratio-low", "loss-plateau", "overtraining"))  # fmt: skip
def masks_interpolated_to_nothing(t: Training) -> None:
    """Masks are made smaller and larger again with a linear interpolation, and `.long()` cuts all that is below 1: no pixel is
    left. Humbatova: wrong preprocessing of labels; SageMaker ClassImbalance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        small = F.interpolate(y[:, None].float(), scale_factor=0.21, mode="bilinear", antialias=True)
        return x, F.interpolate(small, size=segmenter.SIDE, mode="bilinear")[:, 0].long()

    t.sample = sample


@fault(segmenter, "metric-constant", step=49, then=("input-drift", "input-range"))
def void_in_validation(t: Training) -> None:
    """Validation masks hold 0 and 255, and 255 is what the loss ignores: no marked pixel counts, and Dice is 0 throughout.
    Humbatova: wrong labels; UMLAUT: accuracy."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x, (y * 255 if phase == "val" else y)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        known = batch[1].where(batch[1] < 255, 0)
        loss = F.cross_entropy(logits, batch[1], ignore_index=255) + 1 - segmenter.dice(logits, known).mean()
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        marked, wanted = tensors["logits"].argmax(1) == 1, batch[1] == 1
        return {"dice": 2 * float((marked & wanted).sum()) / max(float(marked.sum() + wanted.sum()), 1.0)}

    t.sample, t.forward, t.measure = sample, forward, measure


@fault(segmenter, "input-drift", step=49, then=("overfit", "overtraining", "metric-constant", "input-range"))
def inverted_in_validation(t: Training) -> None:
    """The scanner of the validation set writes white as 0 (MONOCHROME1), and nobody inverts it. SageMaker CheckInputImages;
    Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (segmenter.standardised(1 - (0.2 * x + 0.35)) if phase == "val" else x), y

    t.sample = sample


@fault(segmenter, "input-duplicate", then=("overfit", "overtraining"))
def oversampled_to_one_scan(t: Training) -> None:
    """The sampler weighs scans by their share of foreground to the power of 30 where 1 is meant: batches hold the same scan or two,
    again and again. TrainCheck: duplicated data; SageMaker Overfit."""
    data = {"train": segmenter.scans(segmenter.ITEMS, 0)}
    weights = data["train"][1].float().mean((1, 2)) ** 30
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        if phase != "train":
            return plain(step, phase)
        x, y = data["train"]
        chosen = torch.multinomial(weights / weights.max(), segmenter.BATCH, True, generator=seeded(72, step))
        return segmenter.standardised(x[chosen]), y[chosen]

    t.sample = sample


@fault(segmenter, "overfit", "overtraining", step=80, then=("input-duplicate",))
def three_annotated_scans(t: Training) -> None:
    """Only three scans have been annotated so far, and the run goes on as if there were hundreds. SageMaker Overfit;
    TheDeepChecker: overfitting."""
    x, y = segmenter.scans(3, 5)
    plain = t.sample
    t.sample = lambda step, phase: (segmenter.standardised(x), y) if phase == "train" else plain(step, phase)
    t.model = segmenter.UNet(width=16)


@fault(segmenter, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "down1"), step=110, then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def range_of_a_blank_scan(t: Training) -> None:
    """Each scan is scaled by its own range, `(x - min) / (max - min)`; the one at step 110 is blank. GRIST: division by zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "train" and step == 110:
            x[2] = 0.0
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return (x - low) / (high - low), y

    t.sample = sample


# -- losses ----------------------------------------------------------------------------------------------------------


@fault(segmenter, "nonfinite-loss", "nonfinite-gradient", step=4, then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def logarithm_of_no_overlap(t: Training) -> None:
    """The loss is `-log(dice)` without smoothing, and one scan in forty has nothing to mark: log(0). GRIST: logarithm of zero."""
    plain, blank = t.sample, segmenter.scans(200, 9, 0)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if step % 5 == 4:
            x[0], y[0] = segmenter.standardised(blank[0][step % 200]), 0
        return x, y

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        share = logits.softmax(1)[:, 1]
        overlap = 2 * (share * batch[1]).sum((1, 2)) / (share.sum((1, 2)) + batch[1].sum((1, 2)))
        return {"loss": -overlap.log().mean(), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward


@fault(segmenter, "nonfinite-gradient", "nonfinite-parameter", modules=("", "head"), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def smoothness_by_a_root(t: Training) -> None:
    """A penalty on edges, `sqrt(dx ** 2 + dy ** 2)`, of a map whose border is repeated: at its last corner both are zero, and the
    slope of the root is infinite. GRIST: root of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = segmenter.forward(model, batch)
        share = F.pad(tensors["logits"].softmax(1)[:, 1:], (0, 1, 0, 1), mode="replicate")
        dx, dy = share[..., :-1, :].diff(dim=3), share[..., :-1].diff(dim=2)
        return {**tensors, "loss": tensors["loss"] + 0.01 * (dx.square() + dy.square()).sqrt().mean()}

    t.forward = forward


@fault(segmenter, "prediction-collapse", "class-imbalance", "loss-sign", step=60, then=(*STUCK, *FLAT, "weight-norm-drift", "overfit", "overtraining", "update-ratio-low", "activation-saturated"))  # fmt: skip
def dice_in_place_of_its_loss(t: Training) -> None:
    """Dice itself is added to the cross entropy, not 1 - Dice: whatever overlaps costs, and nothing is marked.
    Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.cross_entropy(logits, batch[1]) + segmenter.dice(logits, batch[1]).mean()
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(segmenter, "activation-exploding", "weight-norm-drift", "prediction-collapse", "loss-input-mismatch", "input-range", "gradient-exploding", modules=("head", "up1", ""), step=5, then=(*DIVERGES, *STUCK, *FLAT, "loss-sign", "activation-saturated", "dtype-headroom", "class-imbalance", "overfit", "gradient-imbalance"))  # fmt: skip
def masks_of_255_as_targets(t: Training) -> None:
    """Masks as files hold them, 0 and 255, go into `binary_cross_entropy_with_logits`: the loss has no lower bound, and scores grow
    without end. Humbatova: missing preprocessing of labels; UMLAUT."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x, y * 255

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], batch[1].float())
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: segmenter.measure(tensors, (batch[0], batch[1] // 255))
    t.optimize = lambda p: torch.optim.Adam(p, 1e-2)


@fault(segmenter, "prediction-collapse", "class-imbalance", step=10, then=(*STUCK, *FLAT, "loss-sign", "update-ratio-low", "overtraining", "activation-saturated"))  # fmt: skip
def background_as_the_ignored_index(t: Training) -> None:
    """`ignore_index=0`, taken from a set whose void is 0: the background costs nothing, and every pixel is marked. Humbatova: wrong
    loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.cross_entropy(logits, batch[1], ignore_index=0)
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(segmenter, "loss-input-mismatch", "activation-saturated", modules=("head", ""), then=(*STUCK, "weight-norm-drift", "gradient-vanishing", "gradient-zero"))  # fmt: skip
def probabilities_into_both_terms(t: Training) -> None:
    """The network ends in a softmax since Dice needs one, and the cross entropy is given its result as well. Humbatova: wrong loss
    for the last layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Softmax(1))
    t.optimize = lambda p: torch.optim.Adam(p, 1e-2)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        x, y = batch
        shares = model(x)
        both = (shares[:, 1] * y).sum((1, 2))
        dice = (2 * both + 1) / (shares[:, 1].sum((1, 2)) + y.sum((1, 2)) + 1)
        return {"loss": F.cross_entropy(shares, y) + 1 - dice.mean(), "logits": shares, "targets": y}

    t.forward = forward


# -- network ---------------------------------------------------------------------------------------------------------


@fault(segmenter, "dead-units", "poor-initialisation", "gradient-zero", "feature-constant", modules=("down1", "down2", "bottom", "up2", "up1"), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "norm-input-variance", "update-ratio-low", "class-imbalance", "units-symmetric"))  # fmt: skip
def prior_in_every_bias(t: Training) -> None:
    """The bias of a rare class, -4.6, is meant for the last layer and set in each one that has a bias, behind its BatchNorm too: no
    ReLU opens. SageMaker DeadRelu; TheDeepChecker: wrong initialisation of biases."""
    for module in t.model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.constant_(module.bias, -4.6)


@fault(segmenter, "gradient-zero", "parameter-unchanged", "module-unused", modules=("down1", "down2"))
def encoder_under_no_grad(t: Training) -> None:
    """The contracting path runs under `no_grad()`, from when its weights were those of another task; now they are random.
    TrainCheck: parameters not updated; SageMaker UnchangedTensor."""
    for part in (t.model.down1, t.model.down2):
        part.forward = torch.no_grad()(part.forward)


@fault(segmenter, "poor-initialisation", "activation-exploding", "gradient-exploding", modules=("down1", "down2", "bottom", "lift2", "up2", "lift1", "up1", "head", ""), then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "gradient-imbalance", "prediction-collapse", "class-imbalance", "update-ratio-low", "activation-saturated", "dtype-headroom"))  # fmt: skip
def orthogonal_with_a_gain_of_ten(t: Training) -> None:
    """`orthogonal_(weight, 10)` without normalisation: the second argument was taken for a seed. SageMaker
    PoorWeightInitialization; TheDeepChecker: exploding activations."""
    t.model = segmenter.UNet(norm=lambda channels: nn.Identity())
    for parameter in t.model.parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, 10)


@fault(segmenter, "activation-vanishing", "poor-initialisation", "gradient-vanishing", "feature-constant", modules=("down1", "down2", "bottom", "lift2", "up2", "lift1", "up1", "head", ""), then=(*STUCK, *FLAT, "gradient-zero", "update-ratio-high", "update-ratio-low", "units-symmetric", "prediction-collapse", "class-imbalance", "dead-units", "parameter-unchanged"))  # fmt: skip
def normal_with_tiny_deviation(t: Training) -> None:
    """`normal_(weight, std=1e-4)` and biases of zero, as an old tutorial has it, without normalisation: nothing of the scan reaches
    the head. TheDeepChecker: vanishing; SageMaker PoorWeightInitialization."""
    t.model = segmenter.UNet(norm=lambda channels: nn.Identity())
    for parameter in t.model.parameters():
        nn.init.normal_(parameter, std=1e-4) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)


@fault(segmenter, "units-symmetric", "poor-initialisation", modules=("down1", "down2", "bottom", "lift2", "up2", "lift1", "up1"), then=(*STUCK, *FLAT, "class-imbalance", "dead-units", "activation-vanishing", "norm-input-variance", "gradient-zero"))  # fmt: skip
def filters_filled_with_one_number(t: Training) -> None:
    """`fill_(0.02)` for all weights: filters of a layer are copies of one another and stay so. TheDeepChecker: symmetry; SageMaker
    PoorWeightInitialization."""
    for parameter in t.model.parameters():
        if parameter.ndim > 1:
            nn.init.constant_(parameter, 0.02)


# -- loop and schedule -----------------------------------------------------------------------------------------------


@fault(segmenter, "model-in-eval", step=20, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))
def preview_leaves_eval_on(t: Training) -> None:
    """At step 20 a preview is drawn with `model.eval()`, and the loop calls `train()` once only, before it. TrainCheck: wrong mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 20)
        return plain_update(training, step, observer)

    t.update = update


@fault(segmenter, "update-ratio-high", "loss-diverged", "loss-spike", "dead-units", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "gradient-zero", "class-imbalance"))  # fmt: skip
def rate_of_the_old_optimizer(t: Training) -> None:
    """SGD was replaced by Adam, and its rate of 0.5 was kept, in a network without normalisation. Humbatova: learning rate; AutoTrainer; SageMaker
    WeightUpdateRatio."""
    t.model = segmenter.UNet(norm=lambda channels: nn.Identity())
    t.optimize = lambda p: torch.optim.Adam(p, 0.5)


@fault(segmenter, "parameter-unchanged", "gradient-zero", then=("step-skipped", *STUCK, "module-unused", "update-ratio-low"))  # fmt: skip
def zeroed_before_stepping(t: Training) -> None:
    """`loss.backward(); optimizer.zero_grad(); optimizer.step()`: what is stepped with is zero or nothing. TrainCheck: misplaced
    `zero_grad`; SageMaker UnchangedTensor."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        training.optimizer.zero_grad()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(segmenter, "gradient-accumulation", "gradient-exploding", "loss-diverged", step=5, then=(*DIVERGES, *STUCK, "dead-units", "overtraining"))  # fmt: skip
def zeroed_after_each_validation(t: Training) -> None:
    """`zero_grad()` has slipped a level to the left, out of the loop over batches: gradients of fifty steps add up. TrainCheck:
    misplaced `zero_grad`."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 50 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(segmenter, "nonfinite-optimizer", "nonfinite-parameter", "scheduler-ends-early", step=180, then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def polynomial_beyond_its_end(t: Training) -> None:
    """The rate falls as `(1 - step / 180) ** 0.9` in a run of 250 steps: the power of a negative number is NaN. GRIST: power of a
    negative number; Humbatova: learning rate."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: float(torch.tensor(1 - step / 180) ** 0.9))


@fault(segmenter, "update-ratio-low", "loss-plateau", "stalled-optimisation", step=60, then=(*STUCK, "parameter-unchanged", "overtraining", "scheduler-ends-early"))  # fmt: skip
def rate_cut_when_dice_rises(t: Training) -> None:
    """`ReduceLROnPlateau` is given Dice, and takes rising for getting worse: after each evaluation the rate is a thousandth.
    Humbatova: learning rate; AutoTrainer: slow convergence."""
    cuts: list[ReduceLROnPlateau] = []

    def validate(training: Training, step: int, observer: Observer) -> None:
        seen: list[float] = []
        plain_measure = training.measure
        cuts.extend([] if cuts else [ReduceLROnPlateau(training.optimizer, factor=1e-3, patience=0, min_lr=0)])

        def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
            metrics = plain_measure(tensors, batch)
            seen.append(float(metrics["dice"]))
            return metrics

        training.measure = measure
        plain_validation(training, step, observer)
        training.measure = plain_measure
        cuts[0].step(sum(seen) / len(seen))

    t.validate, t.val_every = validate, 25


# -- metrics ---------------------------------------------------------------------------------------------------------


@fault(segmenter, "metric-nonfinite", step=99)
def dice_of_empty_masks(t: Training) -> None:
    """Dice of each scan by hand, `2 * both / (marked + wanted)`: where nothing is to be marked and nothing is, 0 / 0. GRIST:
    division by zero; Humbatova: wrong metrics."""
    plain, blank = t.sample, segmenter.scans(40, 9, 0)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        x[:2], y[:2] = segmenter.standardised(blank[0][step % 20 * 2 : step % 20 * 2 + 2]), 0
        return x, y

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        marked, y = tensors["logits"].argmax(1), batch[1]
        each = 2 * (marked * y).sum((1, 2)) / (marked.sum((1, 2)) + y.sum((1, 2)))
        return {"dice": float(each.mean())}

    t.sample, t.measure = sample, measure
