"""What goes wrong in variational autoencoders: weights of the divergence, draws, logarithms of variances, pictures, metrics."""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.nn import functional as F

from faults import generator
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_validation, seeded

COLLAPSED = (*STUCK, *FLAT, "gradient-zero", "overtraining", "update-ratio-low", "dead-units")


def rebuilt(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The plain loss of pixels."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3)).mean()


def lost(t: Training, loss) -> None:
    """The loss becomes `loss(logits, mean, log_variance, x, beta)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, mean, log_variance = model(batch[0])
        total = loss(logits, mean, log_variance, batch[0], model.beta)
        apart = generator.divergence(mean, log_variance).mean()
        return {"loss": total, "divergence": apart, "outputs": logits.sigmoid(), "targets": batch[0]}

    t.forward = forward


def drawn(t: Training, draw) -> None:
    """Codes become `draw(mean, log_variance)` in training."""
    t.model.draw = types.MethodType(lambda self, mean, spread: draw(mean, spread) if self.training else mean, t.model)


def shown(t: Training, change) -> None:
    """Pictures pass through `change(x, step, phase)`."""
    plain = t.sample
    t.sample = lambda step, phase: (change(plain(step, phase)[0].clone(), step, phase),)


# -- divergence ------------------------------------------------------------------------------------------------------


@fault(generator, "output-constant", "feature-constant", "activation-vanishing", modules=("encoder", "decoder", ""), step=15, then=COLLAPSED)  # fmt: skip
def pixels_averaged_codes_summed(t: Training) -> None:
    """The error of pixels is a mean over all of them, the divergence a sum: it counts 256 times too much, and codes say nothing.
    Humbatova: wrong loss; TheDeepChecker: wrong reduction."""

    def loss(logits, mean, log_variance, x, beta):
        apart = generator.divergence(mean, log_variance).mean()
        return F.binary_cross_entropy_with_logits(logits, x) + beta * apart

    lost(t, loss)


@fault(generator, "output-constant", "feature-constant", "activation-vanishing", modules=("encoder", "decoder", ""), step=10, then=(*COLLAPSED, "loss-spike", "loss-diverged"))  # fmt: skip
def warm_up_not_divided(t: Training) -> None:
    """The weight of the divergence is the number of the step, not its share of the warm-up. Humbatova: hyper-parameters; posterior
    collapse."""
    t.before = [lambda training, step: setattr(training.model, "beta", float(step))]


@fault(generator, "loss-sign", "activation-exploding", "gradient-exploding", "weight-norm-drift", modules=("encoder", ""), step=10, then=(*DIVERGES, *NONFINITE, *STUCK, "dead-units", "gradient-imbalance", "overfit", "nonfinite-buffer"))  # fmt: skip
def divergence_is_subtracted(t: Training) -> None:
    """The formula holds minus the divergence already and is subtracted once more: codes run away from the prior. TheDeepChecker:
    wrong sign; Humbatova: wrong loss."""

    def loss(logits, mean, log_variance, x, beta):
        return rebuilt(logits, x) - beta * generator.divergence(mean, log_variance).mean()

    lost(t, loss)


@fault(generator, "gradient-zero", "output-constant", "feature-constant", "activation-vanishing", modules=("encoder", ""), then=(*COLLAPSED, "overfit"))  # fmt: skip
def drawn_without_a_gradient(t: Training) -> None:
    """`Normal(mean, deviation).sample()` where `rsample()` is meant: pixels send nothing back to the encoder, which goes to the prior.
    Humbatova: wrong API call; TrainCheck: a part without gradients."""
    drawn(t, lambda mean, spread: torch.distributions.Normal(mean, (0.5 * spread).exp()).sample())


@fault(generator, "gradient-zero", "output-constant", "feature-constant", "activation-vanishing", modules=("encoder", ""), then=(*COLLAPSED, "overfit"))  # fmt: skip
def mean_left_out_of_the_draw(t: Training) -> None:
    """Codes are noise times the deviation, and the mean is forgotten: it is moved by the divergence alone, to zero. Humbatova: wrong
    formula; SageMaker UnchangedTensor."""
    drawn(t, lambda mean, spread: torch.randn_like(spread) * (0.5 * spread).exp())


class Clamped(nn.Module):
    def forward(self, x):
        return x.clamp(10, -10)


@fault(generator, "gradient-zero", "parameter-unchanged", "feature-constant", "module-unused", modules=("encoder.log_variance",), then=("norm-input-variance",))  # fmt: skip
def bounds_in_the_wrong_order(t: Training) -> None:
    """`clamp(10, -10)` for `clamp(-10, 10)`: the logarithm of the variance is -10 for all, and nothing comes through. GRIST: guards
    against overflow; Humbatova: wrong API call."""
    t.model.encoder.log_variance = nn.Sequential(t.model.encoder.log_variance, Clamped())


@fault(generator, "nonfinite-loss", then=(*NONFINITE, "nonfinite-buffer", "output-constant", "prediction-collapse", "dead-units"))  # fmt: skip
def deviation_by_a_relu(t: Training) -> None:
    """The second head gives the deviation, through a ReLU so that it is not negative; the divergence takes the logarithm of what is
    zero. GRIST: log of zero."""
    t.model.encoder.log_variance = nn.Sequential(t.model.encoder.log_variance, nn.ReLU())
    drawn(t, lambda mean, deviation: mean + torch.randn_like(mean) * deviation)

    def loss(logits, mean, deviation, x, beta):
        apart = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).sum(1).mean()
        return rebuilt(logits, x) + beta * apart

    lost(t, loss)


@fault(generator, "poor-initialisation", "nonfinite-activation", "activation-exploding", "nonfinite-loss", modules=("encoder.log_variance", "encoder", "decoder", ""), then=(*NONFINITE, *DIVERGES, "output-constant", "prediction-collapse", "dead-units"))  # fmt: skip
def variances_beyond_the_exponential(t: Training) -> None:
    """The head of the logarithm of the variance is drawn 500 times too wide: its exponential is infinite for some. GRIST: exp
    overflow; SageMaker PoorWeightInitialization."""
    with torch.no_grad():
        t.model.encoder.log_variance.weight.mul_(500.0)


# -- pictures --------------------------------------------------------------------------------------------------------


@fault(generator, "input-range", "activation-exploding", "loss-input-mismatch", "gradient-exploding", modules=("decoder", "decoder.head", "encoder", ""), then=(*DIVERGES, *STUCK, "loss-sign", "dead-units", "activation-saturated", "gradient-imbalance", "overfit"))  # fmt: skip
def levels_of_255_into_the_entropy(t: Training) -> None:
    """Pictures of 0 to 255, as they are read, for a loss that takes shares: it has no lower bound. UMLAUT: input not normalised;
    Humbatova: missing preprocessing."""
    shown(t, lambda x, step, phase: (255 * x).round())


@fault(generator, "input-constant", "input-duplicate", then=("input-drift", "overfit", "overtraining", *STUCK, "dead-units"))  # fmt: skip
def thumbnails_never_downloaded(t: Training) -> None:
    """Two thirds of the pictures are placeholders, all black. TheDeepChecker: constant inputs; Humbatova: wrong data."""

    def change(x, step, phase):
        if phase == "train":
            x[torch.rand(len(x), generator=seeded(7, step)) < 0.67] = 0.0
        return x

    shown(t, change)


@fault(generator, "input-drift", "input-range", step=49, then=("overfit", "overtraining", "loss-diverged", "metric-nonfinite", "metric-range"))  # fmt: skip
def one_loader_divides(t: Training) -> None:
    """The loader of the validation returns levels of 0 to 255, that of the training shares. SageMaker CheckInputImages; Humbatova:
    wrong preprocessing."""
    shown(t, lambda x, step, phase: 255 * x if phase == "val" else x)


@fault(generator, "input-duplicate", then=("overfit", "overtraining", "batch-leak", "feature-constant", "output-constant", "input-drift", "loss-spike"))  # fmt: skip
def picture_read_before_the_loop(t: Training) -> None:
    """The file is opened before the loop over the batch, which appends one and the same picture each time. TrainCheck: duplicated
    data; Humbatova: wrong data."""
    shown(t, lambda x, step, phase: x[:1].repeat(len(x), 1, 1, 1) if phase == "train" else x)


# -- evaluation ------------------------------------------------------------------------------------------------------


@fault(generator, "metric-nonfinite", step=49)
def variance_over_one_item(t: Training) -> None:
    """Pictures are validated one by one, and the explained share is divided by the variance over the items of the batch: zero. GRIST:
    division by zero; Humbatova: wrong validation metric."""
    plain = t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0][:1],) if phase == "val" else plain(step, phase)

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        rest = (tensors["outputs"] - batch[0]).square().mean()
        return {"explained": float(1 - rest / (batch[0] - batch[0].mean(0)).square().mean())}

    t.measure = measure


@fault(generator, "metric-range", step=49)
def near_pixels_in_hundreds(t: Training) -> None:
    """The accuracy, the share of pixels within a tenth of theirs, is logged times 100 since a plot had it so. Humbatova: wrong
    validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        near = (tensors["outputs"] - batch[0]).abs() < 0.1
        return {"accuracy": 100 * float(near.float().mean()), "divergence": float(tensors["divergence"])}

    t.measure = measure


@fault(generator, "validation-in-train-mode", step=49, then=("metric-aggregate", "batch-leak"))
def codes_drawn_in_validation(t: Training) -> None:
    """`model.train(True)` in the function that evaluates, copied from that which trains: codes are drawn, norms take the batch.
    TrainCheck: wrong mode."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval = lambda: training.model.train(True)
        plain_validation(training, step, observer)
        del training.model.eval

    t.validate = validate
