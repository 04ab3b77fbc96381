"""What goes wrong in segmentation: norms over single values, halves, wrong units, tuned parts, repeated scans, logs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import segmenter
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, update_of_two


def scanned(t: Training, change) -> None:
    """Scans pass through `change(x, step, phase)`."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return change(x, step, phase), y

    t.sample = sample


@fault(segmenter, "input-duplicate", then=("overfit", "overtraining"))
def turned_by_nothing(t: Training) -> None:
    """Two scans are turned four ways, and the function that turns is given an angle of zero each time. TrainCheck: duplicated data;
    Humbatova: wrong data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (x[:2].repeat(4, 1, 1, 1), y[:2].repeat(4, 1, 1)) if phase == "train" else (x, y)

    t.sample = sample


@fault(segmenter, "input-drift", "input-range", step=49, then=("overfit", "overtraining", "metric-constant", "loss-diverged", "prediction-collapse"))  # fmt: skip
def reader_of_validation_in_integers(t: Training) -> None:
    """The reader of the validation set returns grey levels of 0 to 255 and knows of no mean and deviation. Humbatova: wrong
    preprocessing; SageMaker CheckInputImages."""
    scanned(t, lambda x, step, phase: (255 * (0.2 * x + 0.35)).clamp(0, 255).round() if phase == "val" else x)


@fault(segmenter, "input-constant", "input-drift", "input-duplicate", step=49, then=("metric-constant", "prediction-collapse", "output-constant", "feature-constant", "overfit", "overtraining", "class-imbalance", "loss-diverged"))  # fmt: skip
def window_beyond_the_tissue(t: Training) -> None:
    """Grey values of the validation set are cut to a window that is meant for bone: all of them lie below it. Humbatova: wrong
    preprocessing; TheDeepChecker: constant inputs."""
    scanned(t, lambda x, step, phase: x.clamp(min=6.0) if phase == "val" else x)


class Squeezed(segmenter.UNet):
    """The bottom is pooled to one vector for each scan, normalised, and spread again."""

    def __init__(self) -> None:
        super().__init__()
        self.summary = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(32, 32))

    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.summary(self.bottom(F.max_pool2d(coarse, 2))).expand(-1, -1, 6, 6)
        x = self.up2(torch.cat([self.lift2(x), coarse], 1))
        return self.head(self.up1(torch.cat([self.lift1(x), fine], 1)))


@fault(segmenter, "feature-constant", "activation-vanishing", "norm-input-variance", "gradient-vanishing", modules=("summary", "lift2", "bottom", ""), then=("gradient-zero", "parameter-unchanged", "module-unused", "update-ratio-low", "gradient-imbalance"))  # fmt: skip
def group_norm_of_one_value(t: Training) -> None:
    """As many groups as channels, behind a pooling to one value for each: what is left is each value minus itself. Humbatova: wrong
    layer; SageMaker AllZero."""
    t.model = Squeezed()


@fault(segmenter, "poor-initialisation", "activation-saturated", "prediction-collapse", modules=("head",), then=(*STUCK, *FLAT, *DIVERGES, "class-imbalance", "gradient-imbalance", "overtraining", "metric-constant"))  # fmt: skip
def prior_in_percent(t: Training) -> None:
    """The bias of the head is the logarithm of the odds of 4 in percent, times 100: -318 and 318, and nothing is ever marked.
    TheDeepChecker: wrong initialisation of biases."""
    with torch.no_grad():
        t.model.head.bias.copy_(torch.tensor([318.0, -318.0]))


@fault(segmenter, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=(*STUCK, "gradient-accumulation", "gradient-exploding"))  # fmt: skip
def optimizer_before_the_model_is_built(t: Training) -> None:
    """A first model was made to print its size, and the optimizer holds that one. TrainCheck: parameters of another model."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = segmenter.UNet()


@fault(segmenter, "optimizer-duplicate-parameters", then=("update-ratio-high", *DIVERGES))
def both_networks_in_the_second(t: Training) -> None:
    """From an adversarial script: two optimizers, and the second, of the critic that is gone, was given this network. TrainCheck:
    parameters in two optimizers."""
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.SGD(t.model.parameters(), 1e-2)]
    t.update = update_of_two


@fault(segmenter, "loss-diverged", "loss-spike", "update-ratio-high", step=120, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "class-imbalance", "overfit", "gradient-zero"))  # fmt: skip
def second_stage_of_another_optimizer(t: Training) -> None:
    """The second stage, from step 120 on, sets `lr = 0.6`, as SGD had it; the optimizer is Adam. Humbatova: learning rate;
    SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 if step < 120 else 200.0)


@fault(segmenter, "loss-spike", "update-ratio-high", step=100, then=(*DIVERGES, *STUCK))
def best_by_the_lowest_overlap(t: Training) -> None:
    """At steps 100 and 200 the best checkpoint is loaded, the one of the lowest Dice: that of the start. TrainCheck: something
    writes weights back; Humbatova: training process."""
    first = copy.deepcopy(t.model.state_dict())

    def load(training: Training, step: int) -> None:
        if step in (100, 200):
            training.model.load_state_dict(first)

    t.before.append(load)


@fault(
    segmenter, "parameter-unchanged", "update-ratio-low", modules=("down1", "down2", "bottom"), then=("loss-plateau",)
)
def rates_by_depth_rounded(t: Training) -> None:
    """The rate of the encoder is a tenth, written as `1 // 10`. TrainCheck: parameters not updated; Humbatova: learning rate."""
    encoder = [p for part in (t.model.down1, t.model.down2, t.model.bottom) for p in part.parameters()]
    known = {id(p) for p in encoder}
    rest = [p for p in t.model.parameters() if id(p) not in known]
    t.optimizers = [torch.optim.Adam([{"params": encoder, "lr": 3e-3 * (1 // 10)}, {"params": rest}], 3e-3)]


@fault(
    segmenter,
    "weight-norm-drift",
    "loss-sign",
    step=10,
    then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "overfit"),
)
def weights_grow_by_the_penalty(t: Training) -> None:
    """The squares of the weights are subtracted from the loss, 0.02 times: the larger the better. TheDeepChecker: wrong sign; Humbatova:
    regularisation."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = segmenter.forward(model, batch)
        squares = sum(p.square().sum() for p in model.parameters() if p.ndim > 1)
        return {**tensors, "loss": tensors["loss"] - 0.02 * squares}

    t.forward = forward


@fault(segmenter, "metric-grad", step=0, then=("metric-phase-mismatch",))
def overlap_kept_with_its_graph(t: Training) -> None:
    """The soft Dice of each step is logged as it comes out of the loss, with its graph, and kept in a list. PyTorch FAQ; TrainCheck:
    memory."""
    kept: list[torch.Tensor] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        kept.append(segmenter.dice(tensors["logits"], batch[1]).mean())
        observer.log({"soft_dice": torch.stack(kept[-10:]).mean()}, "train", step)
        return batch, tensors

    t.update = update


@fault(segmenter, "metric-vanished", "metric-missing", step=149, then=("metric-phase-mismatch",))
def recall_until_it_is_full(t: Training) -> None:
    """The recall is logged as long as it is new: it is stored under another key once a best value exists. Speech and others: metrics
    that are missing later; Humbatova: wrong validation metric."""
    plain, calls = t.measure, []

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        calls.append(1)
        metrics = plain(tensors, batch)
        return metrics if len(calls) <= 4 else {"dice": metrics["dice"]}

    t.measure = measure


@fault(segmenter, "nonfinite-activation", "input-range", "dtype-headroom", "activation-exploding", modules=("down1", "down2", "bottom", ""), then=(*NONFINITE, *STUCK, "step-skipped", "nonfinite-buffer", "dead-units", "gradient-imbalance"))  # fmt: skip
def scans_of_sixteen_bits_in_half(t: Training) -> None:
    """Scans of 16 bits, up to 65535, in float16: the first convolution overflows. GRIST: overflow; TrainCheck: mixed precision."""
    t.precision, t.scaled, t.steps, t.val_every = torch.float16, True, 25, 25
    scanned(t, lambda x, step, phase: ((0.2 * x + 0.35) * 60000).round().clamp(0, 65000))
